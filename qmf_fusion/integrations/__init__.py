"""Fitting into other people's loops: indices for any data set, monitoring, data parallel, Lightning and Transformers.

``qmf_fusion.integrations.lightning`` needs Lightning and ``qmf_fusion.integrations.transformers`` Transformers; what is
here needs neither.
"""

from .indexed import IndexedDataset
from .monitor import FusionMonitor
from .parallel import leave_history_out

__all__ = ["FusionMonitor", "IndexedDataset", "leave_history_out"]
