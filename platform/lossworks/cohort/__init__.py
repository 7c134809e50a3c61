"""Many small models of one architecture trained at once, with the result of training them one by one."""

from lossworks.cohort.batches import Batches, plan_batches
from lossworks.cohort.learners import Learner, MemberLearner, StackedLearner
from lossworks.cohort.optimizers import AdamW, AdamWSettings, Optimizer, ScheduledAdamW, Sgd
from lossworks.cohort.rules import LocalRule, Seen
from lossworks.cohort.stacked import Member, Stack, StackedModel, member_of, repeat, stack
from lossworks.cohort.training import TrainedMembers, all_finite

__all__ = [
    "AdamW",
    "AdamWSettings",
    "Batches",
    "Learner",
    "LocalRule",
    "Member",
    "MemberLearner",
    "Optimizer",
    "ScheduledAdamW",
    "Seen",
    "Sgd",
    "Stack",
    "StackedLearner",
    "StackedModel",
    "TrainedMembers",
    "all_finite",
    "member_of",
    "plan_batches",
    "repeat",
    "stack",
]
