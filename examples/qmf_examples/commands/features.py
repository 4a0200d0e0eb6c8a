"""``qmf-fusion features``: attach with ``app.command("features", cls=ManyDamages, help=HELP)(features)``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import require_extras, resumable
from .data import Name
from .device import check_device
from .output_folder import disk_errors, prepare_output

HELP = (
    "What frozen encoders see of a data set, clean and damaged, as one .npz file for bench-robustness and report.\n\n"
    "A killed command, run again, goes on from what it had finished. --damage takes kinds with their levels: "
    "gaussian:10,30 (deviation, of 255), salt-pepper:10 (% of the pixels), blur (radius 6; blur:3), black; of texts "
    "words:0.5 (share that is blanked), letters:0.2 (share that is replaced), shuffle, blank; and "
    "gaussian:30+words:0.5 for both at once."
)


class ManyDamages(TyperCommand):
    """Takes several words behind one ``--damage``, up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        listing = False
        for word in args:
            option = word.startswith("-")
            if listing and not option and spread[-1] != "--damage":
                spread.append("--damage")
            listing = word == "--damage" or (listing and not option)
            spread.append(word)
        return super().parse_args(ctx, spread)


def features(
    data_set: Annotated[Name, typer.Argument(metavar="SET", help="nyud2, sunrgbd, food101 or mvsa.")],
    data_root: Annotated[Path, typer.Option(help="The data set's folder.")],
    out: Annotated[Path, typer.Option(help="The .npz file to write.")],
    damage: Annotated[
        list[str] | None, typer.Option(metavar="KIND[:LEVEL,...] ...", help="Of the test split; see above.")
    ] = None,
    copies: Annotated[
        int, typer.Option(min=0, max=1000, help="Copies of the training images, cut out and flipped at random.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of the copies.")] = 1,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of what is computed.", show_default="feature-cache beside the file")
    ] = None,
    image_encoder: Annotated[str | None, typer.Option(help="Any image model of timm, or tiny.")] = None,
    weights: Annotated[str | None, typer.Option(help="The image encoder's: imagenet, a file, or none.")] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Any encoder of Transformers, by name or folder, or tiny.")
    ] = None,
    text_pooling: Annotated[
        str | None, typer.Option(help="Of a text's tokens: mean, first, or BERT's pooler.", show_default="mean")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of a text.")] = None,
    regions: Annotated[int | None, typer.Option(help="Regions that the image is pooled to.", show_default="1")] = None,
    transform: Annotated[
        str | None,
        typer.Option(help="Of images: released, or the encoder's own, the default of all but the paper's ResNets."),
    ] = None,
    load_size: Annotated[int | None, typer.Option(help="Pixels that images are resized to.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels that are cut out of them.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be used.")] = False,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
) -> None:
    """See ``HELP``."""
    given = {
        name: value for name, value in locals().items() if name not in ("damage", "copies", "out", "cache", "device")
    }
    require_extras(("numpy", "PIL", "timm", "torchvision", "transformers"))
    from ..corruption.every_row import parse_damages
    from ..training.settings import FROZEN, resolve

    try:
        damages = parse_damages(damage or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--damage'") from error
    if out.suffix != ".npz":
        raise typer.BadParameter(f"must end in .npz, got {str(out)!r}", param_hint="'--out'")
    check_device(device)
    settings = resolve(data_set.value, FROZEN, {**given, "data_set": data_set.value, "data_root": str(data_root)})
    prepare_output(out.parent, "--out")
    place = cache if cache is not None else out.parent / "feature-cache"
    prepare_output(place, "--cache")
    from ..frozen.feature_file import write_feature_file

    with disk_errors(), resumable("run it again to go on"):
        write_feature_file(settings, damages, copies, out, place, typer.echo, device)
    typer.echo(f"written: {out} (what it was made of stays in {place}, for the next time)")
