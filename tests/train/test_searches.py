"""What a search for ranks tells, and that it compiles once."""

from lowrank_jax.ranks import at_fraction
from train.report import searches
from train.source import Source


def test_a_long_search_tells_how_it_is_getting_on(monkeypatch, capsys):
    """Every few seconds by the clock, with its rate and the best loss so far."""
    now = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(searches.time, "monotonic", lambda: next(now))
    progress = searches.SearchProgress()
    for score in (-3.0, -1.5, -2.0, -1.25):
        progress.scored(score)
    assert capsys.readouterr().err.splitlines() == [
        "search: 2 rank vectors, 0.333 a second, loss 1.5 at best",
        "search: 4 rank vectors, 0.333 a second, loss 1.25 at best",
    ]


def test_rank_vectors_are_scored_by_one_program(run, monkeypatch):
    """However many there are: ranks are traced, the model once."""
    source, count, traced = Source(run, None, []), 40, []

    def sums(outputs, batch):
        traced.append(outputs.shape)
        return task.sums(outputs, batch)

    task = source.run.task
    counted = task._replace(sums=sums)
    monkeypatch.setattr(source, "run", source.run._replace(task=counted))
    fractions = [number / count for number in range(1, count + 1)]
    vectors = [at_fraction(source.ranks, fraction) for fraction in fractions]
    scores = source.context().score(vectors)
    assert len(traced) == 1
    assert len(set(scores)) > count / 2 and max(scores) > scores[0]
