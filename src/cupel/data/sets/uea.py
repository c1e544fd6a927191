"""The UEA archive: series of several channels."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.found import Found
from cupel.data.ucr import series_found

# Neither sizes nor checksums of the archives are published. Where a set has a `.npz`, it is the same series in float32.
SET = DataSet(
    name="uea",
    title="30 sets of labelled series of several channels",
    kind="series",
    licence="none stated; free for research with a citation",
    source="A. Bagnall et al., The UEA multivariate time series classification archive, arXiv:1811.00075, 2018",
    folder="uea",
    examples=0,
    classes=0,
    files=(
        File(
            path="uea/{member}.zip",
            urls=(
                "https://www.timeseriesclassification.com/aeon-toolkit/{member}.zip",
                "https://timeseriesclassification.com/aeon-toolkit/{member}.zip",
            ),
            unpacks="uea/{member}",
            unpacked_bytes=12000000000,
        ),
    ),
    also=(("uea/{member}.npz",),),
    members=(
        "ArticularyWordRecognition",
        "AtrialFibrillation",
        "BasicMotions",
        "CharacterTrajectories",
        "Cricket",
        "DuckDuckGeese",
        "EigenWorms",
        "Epilepsy",
        "ERing",
        "EthanolConcentration",
        "FaceDetection",
        "FingerMovements",
        "HandMovementDirection",
        "Handwriting",
        "Heartbeat",
        "InsectWingbeat",
        "JapaneseVowels",
        "Libras",
        "LSST",
        "MotorImagery",
        "NATOPS",
        "PEMS-SF",
        "PenDigits",
        "PhonemeSpectra",
        "RacketSports",
        "SelfRegulationSCP1",
        "SelfRegulationSCP2",
        "SpokenArabicDigits",
        "StandWalkJump",
        "UWaveGestureLibrary",
    ),
)


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Series `[N, C, T]` with the archive's own parts."""
    return series_found("uea", member, data_dir)
