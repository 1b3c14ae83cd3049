"""Train many sparse autoencoders on one stream of language-model activations, and compare them."""

from importlib.metadata import version

from prolu.blocks import TokenBlocks
from prolu.config import RunConfig
from prolu.data import load_blocks
from prolu.evaluation import HeldOut, evaluate
from prolu.lm import LanguageModel
from prolu.nonlinearities import ProLU, prolu
from prolu.passes import Harvest
from prolu.results import Results
from prolu.sae import SAE, SAEConfig
from prolu.sharing import pull, push
from prolu.splicing import splice
from prolu.statistics import Verdict, matched, points, verdict_table
from prolu.store import ActivationStore, harvest
from prolu.stream import ActivationStream
from prolu.sweeps import grid, run_sweep, run_sweeps, with_seeds
from prolu.training import Trainer

__version__ = version("prolu")

__all__ = [
    "SAE",
    "ActivationStore",
    "ActivationStream",
    "Harvest",
    "HeldOut",
    "LanguageModel",
    "ProLU",
    "Results",
    "RunConfig",
    "SAEConfig",
    "TokenBlocks",
    "Trainer",
    "Verdict",
    "evaluate",
    "grid",
    "harvest",
    "load_blocks",
    "matched",
    "points",
    "prolu",
    "pull",
    "push",
    "run_sweep",
    "run_sweeps",
    "splice",
    "verdict_table",
    "with_seeds",
]
