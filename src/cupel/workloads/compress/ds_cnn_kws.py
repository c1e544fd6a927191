"""Workload `ds-cnn-kws`: spoken digits and the networks that spot words on microcontrollers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cupel.core.context import Context, seeded
from cupel.core.params import param
from cupel.core.protocols import Card
from cupel.core.tasks import Classification
from cupel.core.types import Anatomy, Budget, Examples, Splits, Subject
from cupel.data.spoken_digits import RATE, Recordings, parts, recordings
from cupel.nets.kws import block_names, kws_net, stride_ms
from cupel.ops.mfcc import mfcc

CARD = Card(
    name="ds-cnn-kws",
    family="compress",
    source="Y. Zhang, N. Suda, L. Lai, V. Chandra, Hello Edge: Keyword Spotting on Microcontrollers, 2017, arXiv "
    "1711.07128, sections 3 and 4; data: Z. Jackson et al., Free Spoken Digit Dataset, "
    "github.com/Jakobovski/free-spoken-digit-dataset",
    tags=("speech", "mfcc", "microcontroller", "small", "recurrent"),
    gives=("weights", "gradients", "members", "classes", "blocks", "batchnorm"),
    expects="no published figure is known to us for these networks on these recordings; on the 12 classes of Speech "
    "Commands the paper has 0.944 (ds-cnn S), 0.846 (dnn S), 0.916 (cnn S), 0.929 (lstm S), "
    "0.935 (gru S), 0.940 (crnn S)",
    tiny={"width": 4, "examples": 96},
)
WINDOW_MS, MELS, COEFFICIENTS = 40, 40, 10
FLOOR = 1e-3  # about what rounding to 16 bits leaves under a triangle: silence is not darker than that


def placed(held: Recordings, rows: Tensor, copies: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Recordings in the middle of a second; from the second copy on up to 100 ms off, 4 in 5 under white noise.

    Shapes: sound `[R * copies, 8000]`, labels and index `[R * copies]`; copy k of row r has the index k N + r.
    """
    sounds, index = [], []
    for copy in range(copies):
        room = RATE - held.length[rows]
        shift = torch.zeros_like(rows)
        sound = held.sound[rows]
        if copy:
            shift = torch.randint(-RATE // 10, RATE // 10 + 1, rows.shape, generator=draw)
            volume = 0.1 * torch.rand(len(rows), 1, generator=draw) * (torch.rand(len(rows), 1, generator=draw) < 0.8)
            hiss = torch.randn(sound.shape, generator=draw) * volume * sound.abs().amax(1, keepdim=True) / 3
        start = (room // 2 + shift).clamp(min=torch.zeros_like(room), max=room)
        place = (torch.arange(RATE)[None] - start[:, None]) % RATE
        sound = sound.gather(1, place)
        sounds.append(sound + hiss if copy else sound)
        index.append(rows + copy * len(held.labels))
    return torch.cat(sounds), held.labels[rows].repeat(copies), torch.cat(index)


@dataclass(frozen=True)
class DsCnnKws:
    r"""Recognise spoken digits from their cepstral coefficients with a network made for microcontrollers.

    A second of sound at 8 kHz becomes an image of T windows of 40 ms by 10 coefficients (40 mel triangles), each
    coefficient with mean 0 and spread 1 over the training part; T is 49 (windows 20 ms apart) or, for the networks that
    the paper feeds so, 25 (40 ms). `ds-cnn`: a 10x4 convolution, blocks of a depthwise 3x3 and a 1x1 convolution with
    batch norm and ReLU, the mean over all positions, a linear head. The others of the paper's table stand beside it.

    Use: to study small networks, their integer form and their memory on sound; the split by speaker shows how far what
    they learn carries to a voice they never heard. Not for a comparison with figures on Speech Commands.

    Costs: `ds-cnn` S takes some 5.4 million operations and 38.6 kB at one byte a number an inference (`ops.footprint`
    counts any of them); a fit takes some ten seconds on one core.

    Shapes: inputs `[B, 1, T, 10]`, targets `[B]` in 0..9, logits `[B, 10]`.

    Raises:
        MissingData: there are no recordings on this machine, or too few for the split.

    Source: Zhang, Suda, Lai, Chandra 2017, arXiv 1711.07128; sizes as in the authors' training commands.

    Departs: ten digits at 8 kHz in place of twelve classes at 16 kHz (bands end at 4 kHz in both), no class for
    silence or unknown words; the shifted and noisy copies (`copies`) are drawn once, with white noise; coefficients
    are normalised; batch norms have a gain; no dropout; 20 epochs of Adam with a cosine decay in place of 30,000
    updates.

    Example:
        >>> DsCnnKws(net="gru").size
        'S'
    """

    net: str = param("ds-cnn", "kind of network", choices=("ds-cnn", "dnn", "cnn", "basic-lstm", "lstm", "gru", "crnn"))
    size: str = param("S", "the paper's budget: 80, 200 or 500 kB", choices=("S", "M", "L"))
    width: int = param(0, "channels, units or cells in place of the size's (0: its own)", ge=0, le=1024)
    split: str = param("take", "what the test part shares with no other part", choices=("take", "speaker"))
    copies: int = param(1, "times a training recording is there: as it is, and shifted and noisy", ge=1, le=20)
    examples: int = param(0, "most examples of each split (0: all)", ge=0)
    data_seed: int = param(0, "which takes validate, or which speaker tests; the shifts and the noise", ge=0)

    def build(self, ctx: Context) -> Subject:
        splits = self.images()
        frames = splits.train.inputs.shape[2]
        with ctx.scope("init"):
            net = kws_net(self.net, self.size, 10, frames, COEFFICIENTS, self.width)
        gives = set(CARD.gives)
        if self.net not in ("ds-cnn", "cnn"):
            gives.discard("batchnorm")
        return Subject(
            net,
            splits,
            Classification(10),
            Anatomy(blocks=block_names(net), head="head"),
            Budget(epochs=20, batch_size=50, optimizer="adam", lr=3e-3, schedule="cosine"),
            gives=frozenset(gives),
        )

    def images(self) -> Splits:
        """Train, validation and test images, normalised by the training ones."""
        held = recordings()
        draw = seeded(self.data_seed, "ds-cnn-kws")
        made = []
        for k, rows in enumerate(parts(held, self.split, self.data_seed)):
            # Files stand in order of their names: a few of them shall still be of all digits and speakers.
            chosen = rows[torch.randperm(len(rows), generator=draw)][: self.examples or None].sort().values
            sound, labels, index = placed(held, chosen, self.copies if k == 0 else 1, draw)
            made.append(Examples(self.coefficients(sound), labels, index))
        mean, spread = made[0].inputs.mean((0, 1, 2)), made[0].inputs.std((0, 1, 2))
        return Splits(*(part.having(inputs=(part.inputs - mean) / spread) for part in made))

    def coefficients(self, sound: Tensor) -> Tensor:
        """`[N, 8000]` -> `[N, 1, T, 10]`."""
        window, stride = RATE * WINDOW_MS // 1000, RATE * stride_ms(self.net, self.size) // 1000
        return mfcc(sound, RATE, window=window, stride=stride, mels=MELS, coefficients=COEFFICIENTS, floor=FLOOR)[
            :, None
        ]
