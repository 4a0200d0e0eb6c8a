"""Wrapping the heads one already has: a model from named inputs to fused logits."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .checks import Present, can_look, check_choice, check_logits, check_present, in_order, stack_present
from .divergence import RowWatch
from .dropout import ModalityDropout
from .exported import exportable
from .fusion import FusionOutput, QualityAwareFusion
from .inputs import break_rows, fill_rows, rows_present
from .processes import place_of_process
from .rules import RULES


class FusionModel(nn.Module):
    """Run each modality's own network and fuse what they say.

    Args:
        heads: by modality's name (or a list, whose names are then the fusion's, or their numbers), modules that return
            logits ``[B, *, K]``, or an object with ``.logits``, as Transformers' models do. What the head's last layers
            see, ``[B, *, D]``, goes to a fusion that takes features where the object has ``.features`` too, or the head
            returns a tuple of both tensors.
        fusion: the layer; by default ``QualityAwareFusion(list(heads), **options)``; with ``"robust"``
            ``QualityAwareFusion.robust(list(heads), **options)``, which takes ``num_classes``; with the name of a
            published rule, such as ``"tmc"``, a layer of that rule with these options (``qmf_fusion.rules``).
        modality_dropout: in training, leave out each modality of each sample with this probability, never all of a
            sample's; below 1.
        dropout_seed: of those draws, which continue from ``state_dict``.
        options: passed to that layer.

    A head's input may be a tensor, a tuple of positional or a mapping of keyword arguments. A head whose input is
    missing or None is an absent modality for the whole batch and is not run; its ``unimodal_logits`` are NaN, which
    count in no loss. Where ``present`` is False they are NaN too. Where ``torch.distributed`` is initialised, the
    parameters of a head that is not run in training get gradients of 0, so that ``DistributedDataParallel`` does not
    wait for them for ever while another process runs it.

    A tensor's first dimension is the samples. One whose row holds NaN or an infinity is absent there, whatever its head
    would make of it, and so learns nothing of it: the head sees another sample's row in its place, as it does where
    ``present`` is False (in a batch without any, zeros, which a batch normalisation takes for data: give None instead).
    Tuples and mappings reach a head as they are: NaN in them, as NaN that a head makes of finite inputs itself, spoils
    the gradients of all of its parameters in its own backward.

    In training a warning says once of each modality that no row of it counts though some should; on a device,
    ``QMFLoss`` does.

    Raises:
        TypeError, ValueError: no heads, something that is no module, or a fusion of other modalities. An exception in a
            head says in a note whose it is.

    Example:
        >>> model = FusionModel({"rgb": nn.Linear(8, 3), "depth": nn.Linear(4, 3)})
        >>> model({"rgb": torch.randn(5, 8), "depth": torch.randn(5, 4)}).logits.shape
        torch.Size([5, 3])
        >>> model({"rgb": torch.randn(5, 8)}).weights[1]  # depth is absent
        tensor([0., 0., 0., 0., 0.], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        heads: Mapping[str, nn.Module] | Sequence[nn.Module],
        fusion: QualityAwareFusion | str | None = None,
        *,
        modality_dropout: float = 0.0,
        dropout_seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        heads = _named(heads, fusion)
        for name, head in heads.items():
            if not isinstance(head, nn.Module):
                raise TypeError(f"heads[{name!r}] must be a module, got {type(head).__name__}")
            if not isinstance(name, str) or name in ("", "fusion") or "." in name or hasattr(nn.ModuleDict, name):
                raise ValueError(f"heads must have names, other than 'fusion', that a ModuleDict takes, got {name!r}")
        if fusion == "robust":
            if "num_classes" not in options:
                raise TypeError(
                    "num_classes must be given with fusion='robust': FusionModel(heads, ..., num_classes=K)"
                )
            # Spelled out, as is the default below: jsonargparse reads here which options a configuration may hold.
            fusion = QualityAwareFusion.robust(list(heads), **options)
        elif isinstance(fusion, str):
            fusion = _published(fusion, list(heads), options)
        elif fusion is None:
            if "num_classes" in options:
                raise TypeError(
                    "num_classes goes with fusion='robust' or 'pdf', as in FusionModel(heads, 'pdf', num_classes=K); "
                    "QMF as published takes any number of classes"
                )
            fusion = QualityAwareFusion(list(heads), **options)
        elif not isinstance(fusion, QualityAwareFusion):
            raise TypeError(f"fusion must be a QualityAwareFusion, a rule's name or None, got {type(fusion).__name__}")
        elif options:
            raise ValueError(f"options go to the default fusion; with fusion given, got {sorted(options)}")
        if fusion.names != tuple(heads) and fusion.names != tuple(str(m) for m in range(len(heads))):
            raise ValueError(f"fusion must be of the modalities {list(heads)}, in this order, got {list(fusion.names)}")
        self.heads = nn.ModuleDict(heads)
        self.fusion = fusion
        self.watch = RowWatch(tuple(heads))
        self.dropout = ModalityDropout(modality_dropout, dropout_seed) if modality_dropout else None
        # What ``freeze`` turned off, by head and by the parameter's name in it, so that copies and pickles know too.
        self._frozen: dict[str, set[str]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.heads)

    def forward(self, inputs: Mapping[str, Any] | Sequence[Any], present: Present | None = None) -> FusionOutput:
        """Fuse the heads' logits.

        Args:
            inputs: by modality's name, missing or None for one that is absent from the whole batch; or a list of all.
            present: bool ``[M]``, ``[M, B]`` or ``[M, *]``, or masks by name; False where a modality is absent.

        Raises:
            TypeError, ValueError: inputs that are no mapping and no list of M, hold an unknown name or no modality at
                all; a head that returns no logits; whatever ``QualityAwareFusion`` raises.
        """
        if isinstance(inputs, (list, tuple)) and len(inputs) == len(self.heads):
            inputs = dict(zip(self.heads, inputs, strict=True))
        if not isinstance(inputs, Mapping):
            got = type(inputs).__name__ + (f" of {len(inputs)}" if isinstance(inputs, (list, tuple)) else "")
            raise TypeError(f"inputs must be a mapping from modalities' names {list(self.heads)}, got {got}")
        if isinstance(present, Mapping):
            present = stack_present(present, self.names)
        unknown = [name for name in inputs if name not in self.heads]
        if unknown:
            raise ValueError(f"inputs must be named {list(self.heads)}, got also {unknown}")
        ran = [
            self._run(name, head, inputs.get(name), rows_present(present, m, len(self.heads)))
            for m, (name, head) in enumerate(self.heads.items())
        ]
        logits, features = [x for x, _ in ran], tuple(f for _, f in ran)
        if self.training and torch.is_grad_enabled() and place_of_process()[1] > 1:
            self._touch_heads_not_run(logits)
        # Where no head that could have features was run, there are none to miss, which a criterion would warn of.
        widths = self.fusion.rule.feature_widths or (None,) * len(logits)
        able = [x is not None for x, width in zip(logits, widths, strict=True) if width is not None]
        given = features if able and (not any(able) or any(f is not None for f in features)) else None
        if self.dropout is not None and self.training:
            present = self._drop(self.dropout, logits, present)
        out = self.fusion(logits, present, given)
        if self.training and torch.is_grad_enabled():
            self._watch_rows(out)
        shown, dim = out.unimodal_logits, self.fusion.class_dim
        if out.present is not None:
            shown = tuple(
                torch.where(there.unsqueeze(-1 if dim == -1 else dim), x, torch.nan)
                for there, x in zip(out.present, shown, strict=True)
            )
        # Not by _replace, which torch.compile of PyTorch 2.11 does not take.
        return exportable(FusionOutput(out.logits, out.weights, out.energy, shown, out.present, given))

    def _touch_heads_not_run(self, logits: list[Tensor | None]) -> None:
        """Give their parameters gradients of 0, by way of another head's logits: some process may wait for them."""
        idle = [head for x, head in zip(logits, self.heads.values(), strict=True) if x is None]
        run = [m for m, x in enumerate(logits) if x is not None]
        for head in idle if run else []:
            x = logits[run[0]]
            assert x is not None
            for p in head.parameters():
                if p.requires_grad and type(p) is nn.Parameter:
                    x = x + p.flatten()[:0].sum().to(x)  # 0 whatever the parameter holds, NaN too
            logits[run[0]] = x

    def _watch_rows(self, out: FusionOutput) -> None:
        """Warn where no row of a modality counts though some should; on a device, the criterion does."""
        if not torch.compiler.is_compiling():
            self.watch.steps += 1
        if can_look(out.energy) and not math.isfinite(out.energy.sum().item()):
            counted = out.energy < torch.inf
            self.watch.see(counted, torch.ones_like(counted) if out.present is None else out.present)

    def _drop(self, dropout: ModalityDropout, logits: list[Tensor | None], present: Tensor | None) -> Tensor:
        rows, there = check_logits(logits, class_dim=self.fusion.class_dim)
        if there is None:
            there = torch.ones(len(rows), dtype=torch.bool, device=rows[0].device)
        mask = check_present(present, there, (len(rows), *rows[0].shape[:-1]), rows[0].device)
        assert mask is not None
        stays = dropout(mask if mask.dim() == 2 else mask.flatten(2).any(2))
        return mask & stays.view(*stays.shape, *(1,) * (mask.dim() - 2))

    @staticmethod
    def _run(name: str, head: nn.Module, given: Any, present: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Logits, and features if there are any."""
        if given is None:
            return None, None
        given, whole = fill_rows(given, present)
        out = _call(head, given) if torch.compiler.is_compiling() else _call_by_name(name, head, given)
        logits, features = out, None
        if not isinstance(out, Tensor):
            both = type(out) is tuple and len(out) == 2
            logits, features = out if both else (getattr(out, "logits", None), getattr(out, "features", None))
        # Not by isinstance of "Tensor | None", which torch.compile of PyTorch 2.6 does not take.
        if not isinstance(logits, Tensor) or not (features is None or isinstance(features, Tensor)):
            raise TypeError(f"heads[{name!r}] must return logits or an object with .logits, got {type(out).__name__}")
        return logits if whole is None else break_rows(logits, whole), features

    def freeze(self, *names: str) -> Self:
        """Stop training these heads (all of them, if none is named): no gradients, and evaluation mode for good.

        A name that is no head's is a ValueError.
        """
        for name in self._known(names or self.names):
            off = self._turned_off()
            took = {key for key, p in self.heads[name].named_parameters() if p.requires_grad or p in off}
            self._frozen[name] = self._frozen.get(name, set()) | took
            self.heads[name].requires_grad_(False).eval()
        return self

    def unfreeze(self, *names: str) -> Self:
        """Train these heads again (all of them, if none is named).

        Parameters that were frozen before ``freeze`` stay so, and so does what a head that is still frozen shares. A
        name that is no head's is a ValueError.
        """
        chosen = self._known(names or self.names)
        took = {name: self._frozen.pop(name) for name in dict.fromkeys(chosen) if name in self._frozen}
        off = self._turned_off()
        for name, keys in took.items():
            for key, p in self.heads[name].named_parameters():
                if key in keys and p not in off:
                    p.requires_grad_(True)
            self.heads[name].train(self.training)
        for name in self._frozen:
            self.heads[name].eval()
        return self

    def _turned_off(self) -> set[nn.Parameter]:
        """Every parameter that ``freeze`` holds."""
        return {
            p for name, keys in self._frozen.items() for key, p in self.heads[name].named_parameters() if key in keys
        }

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self._frozen:
            self.heads[name].eval()
        return self

    def parameter_groups(
        self, options: Mapping[str, Mapping[str, Any]] | None = None, **defaults: Any
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: one per head that is not frozen, and one for a learnable fusion.

        A parameter that several heads share is given once, with the first of them.

        Args:
            options: by head's name (or ``"fusion"``), that group's own settings.
            defaults: settings of all groups.

        Example:
            >>> model = FusionModel({"rgb": nn.Linear(8, 3), "depth": nn.Linear(4, 3)})
            >>> groups = model.parameter_groups({"rgb": {"lr": 1e-5}}, lr=1e-3)
            >>> for group in groups:
            ...     print(group["name"], group["lr"])
            rgb 1e-05
            depth 0.001
        """
        options = dict(options or {})
        self._known(tuple(name for name in options if name != "fusion"))
        modules = {**self.heads, "fusion": self.fusion}
        groups = []
        given: set[nn.Parameter] = set()
        for name, module in modules.items():
            parameters = [p for p in module.parameters() if p.requires_grad and p not in given]
            given.update(parameters)
            if parameters:
                groups.append({"params": parameters, "name": name, **defaults, **options.get(name, {})})
        return groups

    def _known(self, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in self.heads:
                raise ValueError(f"names must be among the heads {list(self.heads)}, got {name!r}")
        return names


def _published(rule: str, names: list[str], options: dict[str, Any]) -> QualityAwareFusion:
    """The layer of a published rule with options of its own, and those of every layer."""
    check_choice("fusion", rule, ["robust", *RULES])
    known = [*list(inspect.signature(RULES[rule]).parameters)[1:], "normalize_logits", "class_dim"]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"options of fusion={rule!r} must be among {known}, got {unknown}")
    of_layer = {key: options.pop(key) for key in ("normalize_logits", "class_dim") if key in options}
    if "features" in options:
        options["features"] = in_order("features", options["features"], names)
    return QualityAwareFusion(names, combine=RULES[rule](len(names), **options), **of_layer)


def _named(heads: Any, fusion: Any) -> dict[str, nn.Module]:
    """Heads by name."""
    if isinstance(heads, nn.ModuleDict):
        heads = dict(heads.items())
    elif isinstance(heads, (list, tuple, nn.ModuleList)):
        names = fusion.names if isinstance(fusion, QualityAwareFusion) else [str(m) for m in range(len(heads))]
        if len(names) != len(heads):
            raise ValueError(f"heads must be {len(names)}, of the fusion's modalities {list(names)}, got {len(heads)}")
        heads = dict(zip(names, heads, strict=True))
    if not isinstance(heads, Mapping) or not heads:
        raise TypeError(f"heads must be a mapping from names to modules, or a list, at least one, got {heads!r}")
    return dict(heads)


def _call(head: nn.Module, given: Any) -> Any:
    if isinstance(given, Mapping):
        return head(**given)
    return head(*given) if isinstance(given, tuple) else head(given)


def _call_by_name(name: str, head: nn.Module, given: Any) -> Any:
    try:
        return _call(head, given)
    except Exception as error:
        error.add_note(f"in FusionModel's heads[{name!r}]")
        raise
