"""Arabic tweets with their sentiment, and whether they are sarcastic."""

from __future__ import annotations

from pathlib import Path

from cupel.data.dataset import DataSet, File
from cupel.data.tweets import Tweets, tweets

# Sizes and checksums: the files of the publisher's repository at commit 62a114b608.
SET = DataSet(
    name="arsarcasm",
    title="10,547 Arabic tweets: negative, neutral or positive",
    kind="texts",
    licence="MIT (I. Abu Farha)",
    source="I. Abu Farha, W. Magdy, From Arabic Sentiment Analysis to Sarcasm Detection: The ArSarcasm Dataset, OSACT "
    "at LREC 2020",
    folder="arsarcasm",
    examples=10547,
    classes=3,
    files=(
        File(
            path="arsarcasm/ArSarcasm_train.csv",
            urls=("https://raw.githubusercontent.com/iabufarha/ArSarcasm/master/dataset/ArSarcasm_train.csv",),
            bytes=1780051,
            sha256="6705a3d11572a6f20d41e32a38abee1462c38aa93eec7d9996db8545a3da5364",
        ),
        File(
            path="arsarcasm/ArSarcasm_test.csv",
            urls=("https://raw.githubusercontent.com/iabufarha/ArSarcasm/master/dataset/ArSarcasm_test.csv",),
            bytes=445756,
            sha256="1a0e0df65d6dde96f7e01ad81c512bf8397cc9b66a7b3ff2fa0318b793883a34",
        ),
    ),
    also=(("arsarcasm/arsarcasm.csv.gz",),),
    remark="Tweets hold user names and offensive words as they were published.",
)


def read(member: str = "", data_dir: Path | None = None) -> Tweets:
    """All tweets with the publisher's parts."""
    return tweets(data_dir)
