"""What the Hugging Face hub and its readers say beside what matters."""

import logging


def quieten_hub() -> None:
    """Leave out progress bars, retries and advice of downloads: what went wrong is in the error."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("huggingface_hub", "timm"):
        logging.getLogger(name).setLevel(logging.ERROR)
