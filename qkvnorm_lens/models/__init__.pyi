from .attention import (
    Attention as Attention,
    KVCache as KVCache,
    Rotation as Rotation,
    Tap as Tap,
    block_norm as block_norm,
    calibrated as calibrated,
    head_norm as head_norm,
    input_gain as input_gain,
    no_tap as no_tap,
    shared_gain as shared_gain,
    visible_mean as visible_mean,
)
from .bridge import (
    QKVNormArchitectureAdapter as QKVNormArchitectureAdapter,
    QKVNormAttentionBridge as QKVNormAttentionBridge,
    from_pretrained as from_pretrained,
    save_pretrained as save_pretrained,
    to_bridge as to_bridge,
    to_plain as to_plain,
)
from .cards import (
    LoadError as LoadError,
    read_card as read_card,
    read_object as read_object,
    write_card as write_card,
)
from .config import (
    ARCHITECTURE as ARCHITECTURE,
    NAMED as NAMED,
    Gains as Gains,
    NormKind as NormKind,
    NormOver as NormOver,
    NormSpec as NormSpec,
    Placement as Placement,
    QKVNormConfig as QKVNormConfig,
    ScoreScale as ScoreScale,
    Sinusoids as Sinusoids,
    Skip as Skip,
    named_config as named_config,
)
from .fields import ACTIVATIONS as ACTIVATIONS, POSITIONS as POSITIONS
from .loading import Source as Source, find as find, load_model as load_model
from .model import (
    Block as Block,
    CachedOutput as CachedOutput,
    FeedForward as FeedForward,
    QKVNormTransformer as QKVNormTransformer,
    SinusoidalPositions as SinusoidalPositions,
    TokenEmbedding as TokenEmbedding,
    fold_gains as fold_gains,
    plain_norm as plain_norm,
    rotation_at as rotation_at,
    visible_keys as visible_keys,
)
from .norms import Calibrated as Calibrated, Gain as Gain, Norm as Norm
from .shipped import (
    DEFAULT as DEFAULT,
    EXPERIMENT_MODELS as EXPERIMENT_MODELS,
    SHIPPED as SHIPPED,
    checkpoint_card as checkpoint_card,
    checkpoint_path as checkpoint_path,
    checkpoints as checkpoints,
    experiment_models as experiment_models,
    how_to_get as how_to_get,
    is_experiment_model as is_experiment_model,
    load_checkpoint as load_checkpoint,
)
