import hooks as hooks

from .models import (
    NormSpec as NormSpec,
    QKVNormConfig as QKVNormConfig,
    QKVNormTransformer as QKVNormTransformer,
    Sinusoids as Sinusoids,
    checkpoint_card as checkpoint_card,
    from_pretrained as from_pretrained,
    load_checkpoint as load_checkpoint,
    load_model as load_model,
    named_config as named_config,
    save_pretrained as save_pretrained,
    to_bridge as to_bridge,
    to_plain as to_plain,
)
from .plots import (
    collapse_curve as collapse_curve,
    head_map as head_map,
    training_curves as training_curves,
)

__version__: str
