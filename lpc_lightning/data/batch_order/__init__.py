"""Orders of the training pairs in an epoch, which decide the pairs that share a batch.

With every order, each pair is used once in an epoch, and in any step with the same probability.
"""

from lpc_lightning.data.batch_order.balanced import Balanced
from lpc_lightning.data.batch_order.base import BatchOrder, Shuffled
from lpc_lightning.data.batch_order.by_annotator import ByAnnotator
from lpc_lightning.data.batch_order.by_length import ByLength
from lpc_lightning.data.batch_order.by_prompt import ByPrompt

__all__ = ["Balanced", "BatchOrder", "ByAnnotator", "ByLength", "ByPrompt", "Shuffled"]
