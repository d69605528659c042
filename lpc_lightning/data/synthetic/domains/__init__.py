"""Domains of the prompts, one in each file."""

from lpc_lightning.data.synthetic.domains.cooking import COOKING
from lpc_lightning.data.synthetic.domains.finance import FINANCE
from lpc_lightning.data.synthetic.domains.fitness import FITNESS
from lpc_lightning.data.synthetic.domains.gardening import GARDENING
from lpc_lightning.data.synthetic.domains.health import HEALTH
from lpc_lightning.data.synthetic.domains.history import HISTORY
from lpc_lightning.data.synthetic.domains.parenting import PARENTING
from lpc_lightning.data.synthetic.domains.programming import PROGRAMMING
from lpc_lightning.data.synthetic.domains.travel import TRAVEL
from lpc_lightning.data.synthetic.domains.writing import WRITING

DOMAINS = (COOKING, FINANCE, FITNESS, GARDENING, HEALTH, HISTORY, PARENTING, PROGRAMMING, TRAVEL, WRITING)

__all__ = ["DOMAINS"]
