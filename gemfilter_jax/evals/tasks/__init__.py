"""Evaluation tasks, one file each, and their registry."""

from gemfilter_jax.evals.task import Task
from gemfilter_jax.evals.tasks import hidden_facts, needles

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        needles.Needles,
        hidden_facts.HiddenFacts,
    )
}
