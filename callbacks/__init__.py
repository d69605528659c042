"""What happens around training: one callback a file."""

from callbacks.graceful_stop import GracefulStop
from callbacks.resources import ResourceMonitor
from callbacks.run_summary import RunSummary

__all__ = ["GracefulStop", "ResourceMonitor", "RunSummary"]
