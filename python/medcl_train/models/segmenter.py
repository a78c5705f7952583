"""The fine-tuned network of IDEAL: one shared encoder E, two decoders D1 and D2 of different
architecture."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .decoders import DeepLabDecoder, FPNDecoder
from .unet import BilinearDecoder, TransposedDecoder, UNetEncoder

DECODERS = {
    "transposed": TransposedDecoder,
    "bilinear": BilinearDecoder,
    "fpn": FPNDecoder,
    "deeplab": DeepLabDecoder,
}


class TwinSegmenter(nn.Module):
    """Encoder with one or two decoders; `forward` gives the logits of each decoder, [(B, K,
    *spatial), ...].

    Only the encoder is shared: no decoder parameter receives a gradient from the other decoder's
        loss.
    """

    def __init__(self, encoder: nn.Module, decoders: Sequence[nn.Module], num_classes: int):
        super().__init__()
        self.encoder = encoder
        self.decoders = nn.ModuleList(decoders)
        self.num_classes = num_classes

    def forward(
        self,
        image: Tensor,
        second_image: Tensor | None = None,
        second_maps: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ) -> list[Tensor]:
        """Logits per decoder.

        Args:
            image: (B, 1, *spatial).
            second_image: what D2's branch sees, through a pass of its own with dropout of its own;
                may be `image` itself. None: D2 reads the maps that D1 reads.
            second_maps: perturbs the list of maps before D2 only.
        """
        maps = self.encoder(image)
        outputs = [self.decoders[0](maps)]
        for decoder in self.decoders[1:]:
            own = maps if second_image is None else self.encoder(second_image)
            outputs.append(decoder(own if second_maps is None else second_maps(own)))
        return outputs

    def probabilities(self, image: Tensor, head: str = "d1") -> Tensor:
        """Softmax map (B, K, *spatial) of one head: "d1", "d2" or "mean" of all decoders."""
        maps = self.encoder(image)
        if head == "mean":
            parts = [torch.softmax(d(maps).float(), dim=1) for d in self.decoders]
            return torch.stack(parts).mean(dim=0)
        index = {"d1": 0, "d2": 1}.get(head)
        if index is None or index >= len(self.decoders):
            have = [f"d{i + 1}" for i in range(len(self.decoders))] + ["mean"]
            raise ValueError(f"head {head!r} is not one of {have}")
        return torch.softmax(self.decoders[index](maps).float(), dim=1)


def build_segmenter(
    num_classes: int,
    *,
    widths: Sequence[int],
    dropout: Sequence[float],
    decoders: Sequence[str] = ("transposed", "bilinear"),
    in_channels: int = 1,
    spatial_dims: int = 2,
    seed: int = 0,
) -> TwinSegmenter:
    """A TwinSegmenter whose parts are initialised from separate seeds (encoder: seed, decoder i:
    seed + 1 + i).

    Separate seeds make the initial encoder and D1 the same whether or not D2 is built, so that a
    supervised run and an IDEAL run of one seed start from the same weights. The global random state
    is left untouched.

    Raises: ValueError for an unknown decoder name.
    """
    for name in decoders:
        if name not in DECODERS:
            raise ValueError(f"unknown decoder {name!r}; choose from {sorted(DECODERS)}")

    def seeded(offset, make):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + offset)
            return make()

    encoder = seeded(
        0, lambda: UNetEncoder(in_channels, widths, dropout, spatial_dims=spatial_dims)
    )
    heads = [
        seeded(
            1 + i, lambda name=name: DECODERS[name](widths, num_classes, spatial_dims=spatial_dims)
        )
        for i, name in enumerate(decoders)
    ]
    return TwinSegmenter(encoder, heads, num_classes)
