"""Quality-aware Multimodal Fusion (Zhang et al., ICML 2023): weight each modality per sample by how certain it is."""

from . import functional
from .fusion import FusionOutput, QualityAwareFusion
from .model import FusionModel
from .objective import QMFLoss
from .ranking import TrajectoryRankingLoss
from .theory import FusionReport, fusion_report
from .trajectory import LossTrajectory
from .version import __version__

__all__ = [
    "FusionModel",
    "FusionOutput",
    "FusionReport",
    "LossTrajectory",
    "QMFLoss",
    "QualityAwareFusion",
    "TrajectoryRankingLoss",
    "__version__",
    "functional",
    "fusion_report",
]
