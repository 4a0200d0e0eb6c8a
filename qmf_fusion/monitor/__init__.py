"""Is a sensor dying? Watch what each modality of a deployed fusion gives, and raise an alarm that can be relied on."""

from .alarm import Alarm
from .reliability import ReliabilityMonitor

__all__ = ["Alarm", "ReliabilityMonitor"]
