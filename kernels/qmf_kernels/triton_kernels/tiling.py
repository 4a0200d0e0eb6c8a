"""How much of the logits one program takes: a formula, so that no search runs at a user's first step.

Rows whose M times K logits fit a program's registers are one tile, which stays there between the pass that finds the
energies and the pass that needs the weights; wider rows are walked.
"""

from typing import NamedTuple

_ROW = 8192  # most logits of one row, all modalities, that are kept in registers: 32 per lane of 8 warps
_ROWS = 2048  # logits of a program that takes several short rows
_MOST_ROWS = 256  # of rows, two per lane of 4 warps: what is one number per row would fill its registers
_WALK = 2048  # logits of a step along a wide row
_BATCH = 8192  # most logits of a batch that one program takes alone
_BATCH_PAIRS = 128  # most samples of it where each has all the others for partners
_FEW, _MANY = 4, 8  # modalities; of more, what is one number per row leaves fewer registers for logits, or hardly any
_LANES = 256  # of 8 warps
_WIDE, _SHORT = 1024, 512  # logits per warp; several rows need more addresses


class Tiling(NamedTuple):
    """Rows and classes per tile (powers of two), tiles per row, and warps per program."""

    rows: int
    classes: int
    tiles: int
    warps: int


def tile(
    num_modalities: int,
    num_classes: int,
    num_rows: int,
    heavy: bool = False,
    alone: bool = False,
) -> Tiling:
    """The tile for M heads of K classes and R rows; ``heavy``: float64, or every option at once in one program, take
    more registers per logit; ``alone``: one program walks them all, with eight warps.
    """
    classes = power_of_two(num_classes)
    share = 2 if num_modalities > _FEW else 1  # numbers per row take registers too
    many = num_modalities > _MANY
    if num_modalities * classes > (_ROW // 4 if heavy else _ROW) or (many and classes > _LANES):
        walk = _LANES * num_modalities if many else _WALK // (2 * share if heavy else share)
        classes = min(1024, max(32, power_of_two(walk // num_modalities + 1) // 2))
        warps = _warps(num_modalities * classes, _per_warp(num_modalities, _SHORT, heavy))
        return Tiling(1, classes, -(-num_classes // classes), warps)
    rows = _ROWS // (2 * share if heavy else share) // power_of_two(num_modalities * classes)
    rows = max(1, min(rows, power_of_two(num_rows), _MOST_ROWS))
    if alone:
        return Tiling(rows, classes, 1, 8)
    several = rows > 1 and num_modalities > _FEW
    each = _per_warp(num_modalities, _SHORT if rows > 1 else _WIDE, heavy or several)
    return Tiling(rows, classes, 1, max(_warps(num_modalities * rows * classes, each), rows // 64))


def fits_one(num_modalities: int, num_classes: int, batch: int, pairs: str) -> bool:
    """Whether one program is to take the whole batch."""
    logits = num_modalities * power_of_two(batch) * power_of_two(num_classes)
    return num_modalities <= _MANY and logits <= _BATCH and (pairs == "adjacent" or batch <= _BATCH_PAIRS)


class Block(NamedTuple):
    """Samples per program of the ranking, partners compared at a time, and warps."""

    samples: int
    partners: int
    warps: int
    alone: bool = False  # there is but one program


def sample_block(batch: int, pairs: str, alone: bool = False) -> Block:
    """Wide where a sample has two partners; where it has all the others, as many programs as fill a device, unless one
    program stands ``alone``, with eight warps.
    """
    if alone:
        samples = power_of_two(batch)
        return Block(samples, min(samples, max(1, 2048 // samples)), 8, alone)
    if pairs == "adjacent":
        samples = min(256, max(32, power_of_two(batch)))
        return Block(samples, 1, max(4, samples // 64))
    return Block(min(32, power_of_two(batch)), min(128, power_of_two(batch)), 4)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()


def _per_warp(num_modalities: int, logits: int, heavy: bool) -> int:
    """A warp's share of a tile: ``logits``, fewer where registers are scarce, but one of each modality per lane."""
    if num_modalities > _MANY or (num_modalities > _FEW and heavy):
        return 32 * num_modalities
    return logits // 2 if heavy else logits


def _warps(logits: int, each: int) -> int:
    return max(1, min(8, power_of_two(-(-logits // each))))
