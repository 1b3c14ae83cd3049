"""The public names of `prolu`, collected from the modules that define them. `prolu` itself imports them late."""

from prolu.activations.harvesting import Harvest
from prolu.activations.language_model import LanguageModel
from prolu.activations.packing import load_blocks
from prolu.activations.store import ActivationStore
from prolu.activations.store_writer import harvest
from prolu.activations.stream import ActivationStream
from prolu.activations.token_blocks import TokenBlocks
from prolu.activations.token_mask import TokenMask
from prolu.evaluation.attribution import Attribution, attribute, logit_difference
from prolu.evaluation.comparison.points import points
from prolu.evaluation.comparison.seed_agreement import seed_agreement
from prolu.evaluation.comparison.standings import Standing, standings
from prolu.evaluation.comparison.verdicts import Verdict, matched, verdict_table
from prolu.evaluation.held_out import HeldOut
from prolu.evaluation.latents_on_text import LatentsOnText, latents_on
from prolu.evaluation.scoring import evaluate
from prolu.evaluation.splicing import splice, steer
from prolu.interop.sharing import pull, push
from prolu.sae.autoencoder import SAE
from prolu.sae.nonlinearities import ProLU, prolu
from prolu.sae.saved_sae import SAEConfig
from prolu.studies.grids import grid, with_seeds
from prolu.studies.results import Results
from prolu.studies.sweep import run_sweep, run_sweeps
from prolu.training.config import RunConfig
from prolu.training.trainer import Trainer

__all__ = [
    "SAE",
    "ActivationStore",
    "ActivationStream",
    "Attribution",
    "Harvest",
    "HeldOut",
    "LanguageModel",
    "LatentsOnText",
    "ProLU",
    "Results",
    "RunConfig",
    "SAEConfig",
    "Standing",
    "TokenBlocks",
    "TokenMask",
    "Trainer",
    "Verdict",
    "attribute",
    "evaluate",
    "grid",
    "harvest",
    "latents_on",
    "load_blocks",
    "logit_difference",
    "matched",
    "points",
    "prolu",
    "pull",
    "push",
    "run_sweep",
    "run_sweeps",
    "seed_agreement",
    "splice",
    "standings",
    "steer",
    "verdict_table",
    "with_seeds",
]
