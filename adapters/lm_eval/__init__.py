"""lm-eval's own harness over an ensemble, or over anything that answers the `Scorer` protocol.

lm = EnsembleLM("path/to/ensemble", specialists="medical", batch_size=8)
results = evaluate(lm, ["openbookqa_local", "hellaswag"], limit=100)

Importing this registers the model as `rc_agents` with lm-eval, so that its own command takes it too:
`lm_eval run --model rc_agents --model_args pretrained=...` after `import rc_agents.adapters.lm_eval`.
"""

try:
    import lm_eval  # noqa: F401
except ImportError:
    raise ImportError(
        "rc_agents.adapters.lm_eval needs lm-eval; run: pip install 'rc-agents[eval]'"
    ) from None

from .ensemble import EnsembleLM
from .report import LOCAL_TASKS
from .running import evaluate
from .scorer import ScorerLM

__all__ = ["LOCAL_TASKS", "EnsembleLM", "ScorerLM", "evaluate"]
