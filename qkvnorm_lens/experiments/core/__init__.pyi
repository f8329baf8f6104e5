from .base import (
    SIZES as SIZES,
    Claim as Claim,
    Experiment as Experiment,
    Part as Part,
    Size as Size,
    Subject as Subject,
    by_size as by_size,
    experiment as experiment,
    joined as joined,
    listed as listed,
)
from .draw import (
    COLOURS as COLOURS,
    PLACEMENT_NAMES as PLACEMENT_NAMES,
    Axes as Axes,
    Figure as Figure,
    error_bar as error_bar,
    finish as finish,
    groups as groups,
    key as key,
    label as label,
    legend_below as legend_below,
    panels as panels,
    percents as percents,
    whole_numbers as whole_numbers,
)
from .grouped import (
    PLAIN as PLAIN,
    STUDY as STUDY,
    about as about,
    by_group as by_group,
    group_mean as group_mean,
    group_share as group_share,
    is_language as is_language,
    kinds_of_models as kinds_of_models,
    markdown as markdown,
    numbers as numbers,
    pick as pick,
    placement_gaps as placement_gaps,
    placement_of as placement_of,
    study_difference as study_difference,
)
from .read import (
    AMOUNT as AMOUNT,
    UNSCORED as UNSCORED,
    Amount as Amount,
    Reading as Reading,
    reading as reading,
    reading_parts as reading_parts,
)
from .registry import NAMES as NAMES, get_experiment as get_experiment
from .report import write_report as write_report
from .running import Outcome as Outcome, fitting as fitting, run_experiment as run_experiment
from .stats import (
    Mean as Mean,
    counted as counted,
    difference as difference,
    mean as mean,
    power as power,
    seeds_wanted as seeds_wanted,
    share as share,
)
from .studies import (
    CENTRING_SEEDS as CENTRING_SEEDS,
    CONFOUND_STEPS as CONFOUND_STEPS,
    CONFOUNDS as CONFOUNDS,
    MODELS as MODELS,
    runs as runs,
    trained as trained,
)
from .subjects import default_subjects as default_subjects, find_subjects as find_subjects
from .verdict import (
    Finding as Finding,
    Verdict as Verdict,
    above as above,
    agrees as agrees,
    below as below,
    decide as decide,
    denied as denied,
    every as every,
    graded as graded,
    reaches as reaches,
    within as within,
)
