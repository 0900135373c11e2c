"""Evaluation tasks, one file each, and their registry."""

from gemfilter_jax.evals.task import Task
from gemfilter_jax.evals.tasks import hidden_facts, longbench, needles, no_literal_match, real_questions, ruler

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        needles.Needles,
        hidden_facts.HiddenFacts,
        no_literal_match.NoLiteralMatch,
        longbench.LongBench,
        real_questions.RealQuestions,
        ruler.Ruler,
    )
}
