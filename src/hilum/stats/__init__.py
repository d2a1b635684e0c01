"""Statistics at the level of patients: intervals, paired tests, corrections. numpy and scipy only."""

from hilum.stats.intervals import NUM_RESAMPLES as NUM_RESAMPLES
from hilum.stats.intervals import Difference as Difference
from hilum.stats.intervals import Interval as Interval
from hilum.stats.intervals import bootstrap_interval as bootstrap_interval
from hilum.stats.intervals import bootstrap_many as bootstrap_many
from hilum.stats.intervals import difference_of as difference_of
from hilum.stats.intervals import interval_of as interval_of
from hilum.stats.intervals import paired_difference as paired_difference
from hilum.stats.many import MeanRank as MeanRank
from hilum.stats.many import holm as holm
from hilum.stats.many import mean_ranks as mean_ranks
from hilum.stats.many import run_spread as run_spread
from hilum.stats.many import total_se as total_se
from hilum.stats.permutation import PermutationTest as PermutationTest
from hilum.stats.permutation import permutation_test as permutation_test
from hilum.stats.permutation import permutation_test_of_runs as permutation_test_of_runs
from hilum.stats.roc import DeLongTest as DeLongTest
from hilum.stats.roc import delong as delong
from hilum.stats.roc import delong_contrast as delong_contrast
from hilum.stats.roc import delong_test as delong_test
from hilum.stats.roc import hanley_mcneil_se as hanley_mcneil_se
