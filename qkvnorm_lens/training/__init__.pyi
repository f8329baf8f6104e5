from .addition import (
    END as END,
    EQUALS as EQUALS,
    PAD as PAD,
    SPLITS as SPLITS,
    VOCAB as VOCAB,
    Accuracy as Accuracy,
    AccuracyCounter as AccuracyCounter,
    Batch as Batch,
    Split as Split,
    adds_integers as adds_integers,
    build_tokenizer as build_tokenizer,
    draw as draw,
    get_split as get_split,
    tests_of as tests_of,
    trained_on as trained_on,
)
from .language import (
    Texts as Texts,
    TextScore as TextScore,
    Windows as Windows,
    held_out as held_out,
    ngram_loss as ngram_loss,
    score as score,
)
from .recipes import (
    RECIPES as RECIPES,
    LearningRate as LearningRate,
    Recipe as Recipe,
    get_recipe as get_recipe,
    make_optimizers as make_optimizers,
)
from .run import (
    TEST_SEED as TEST_SEED,
    Run as Run,
    describe as describe,
    evaluate as evaluate,
    get_task as get_task,
    positions_for as positions_for,
    processes as processes,
    sequences as sequences,
)
from .run_files import RunFileError as RunFileError
from .trainer import Stopped as Stopped, Trainer as Trainer, train as train
