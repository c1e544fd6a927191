"""Spoken English words."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.found import Found
from cupel.data.local import local
from cupel.data.speech import read_commands

# Size and sha256: tensorflow/datasets, url_checksums/speech_commands.txt; torchaudio compares with the same.
SET = DataSet(
    name="speech-commands",
    title="105,829 recordings of 35 English words, one second at 16 kHz",
    kind="series",
    licence="CC BY 4.0",
    source="P. Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, arXiv:1804.03209, 2018",
    folder="speech-commands",
    examples=105829,
    classes=35,
    files=(
        File(
            path="speech-commands/speech_commands_v0.02.tar.gz",
            urls=(
                "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
                "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
            ),
            bytes=2428923189,
            sha256="af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
            unpacks="speech-commands/speech_commands_v0.02",
            unpacked_bytes=5000000000,
        ),
    ),
    remark="Takes 6.8 GB of memory when it is read.",
)


def read(member: str = "", data_dir: Path | None = None) -> Found:
    """Sound `[N, 1, 16000]` in [-1, 1) with the official parts."""
    return read_commands(local("speech-commands/speech_commands_v0.02", data_dir=data_dir))
