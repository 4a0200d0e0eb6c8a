"""The device that a command is asked to use, tried before its work."""

import typer


def check_device(name: str) -> None:
    """Try the device now, rather than after the data.

    Raises:
        typer.BadParameter: it is not there.
    """
    import torch

    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no data")
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].strip().rstrip(".") if str(error) else type(error).__name__
        raise typer.BadParameter(f"{name!r} cannot be used here: {reason}", param_hint="'--device'") from error
