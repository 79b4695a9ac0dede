"""The report: what it claims, what it refuses, and that no text can break the page."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ft_core.datasets import EmbeddingQAFinetuneDataset
from ft_core.errors import ArgumentError, MissingExtraError
from ft_core.evaluation import Evaluation
from ft_core.metrics import score_rankings
from ft_core.report import Report
from ft_core.report.comparison import holm
from ft_core.report.text import excerpt, listed, metric_label, number, p_value, printable

METRICS = ["hit_rate@1", "recall@10", "mrr@10", "ndcg@10"]
NASTY = "<script>alert(1)</script> & \"'> \x00\x1b[31m\u202e $x^2$ {{ 7 * 7 }} 数 ð"


def make_dataset(queries: int = 40) -> EmbeddingQAFinetuneDataset:
    return EmbeddingQAFinetuneDataset(
        queries={f"q{i}": f"question {i} {NASTY}" for i in range(queries)},
        corpus={f"d{i}": f"document {i} {NASTY}" for i in range(queries)},
        relevant_docs={f"q{i}": [f"d{i}"] for i in range(queries)},
    )


def make_run(
    name: str,
    dataset: EmbeddingQAFinetuneDataset,
    ranks: list[int | None],
    *,
    depth: int = 20,
    metrics: list[str] = METRICS,
) -> Evaluation:
    """Return a run in which the relevant document of query i stands at ranks[i]."""
    rankings = {}
    for query, rank in zip(dataset.queries, ranks, strict=True):
        wanted = dataset.relevant_docs[query][0]
        ranking = [document for document in dataset.corpus if document != wanted]
        if rank is not None:
            ranking.insert(rank - 1, wanted)
        rankings[query] = ranking[:depth]
    return Evaluation(
        name=name,
        dataset_hash=dataset.content_hash,
        scores=score_rankings(dataset.qrels, rankings, metrics),
        rankings=rankings,
        seconds=1.0,
    )


@pytest.fixture(scope="module")
def dataset() -> EmbeddingQAFinetuneDataset:
    return make_dataset()


@pytest.fixture(scope="module")
def base(dataset: EmbeddingQAFinetuneDataset) -> Evaluation:
    return make_run("base", dataset, [1, 2, 3, 5, None] * 8)


@pytest.fixture(scope="module")
def tuned(dataset: EmbeddingQAFinetuneDataset) -> Evaluation:
    return make_run("tuned", dataset, [2, 1, 1, 2, 4] * 8)


@pytest.fixture(scope="module")
def report(base: Evaluation, tuned: Evaluation, dataset: EmbeddingQAFinetuneDataset) -> Report:
    return Report([base, tuned], dataset)


def shown(report: Report, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Page(HTMLParser):
    """What matters of a page: its elements, ids, references and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


class TestVerdict:
    def test_better(self, report: Report) -> None:
        assert re.fullmatch(
            r"tuned is better than base in nDCG@10: \+0\.\d+ \(\+0\.\d+ to \+0\.\d+\), p .*\.",
            report.verdict("tuned"),
        )
        assert report.outcome("tuned") == "better"

    def test_worse_when_the_baseline_is_the_better_one(
        self, base: Evaluation, tuned: Evaluation, dataset: EmbeddingQAFinetuneDataset
    ) -> None:
        report = Report([base, tuned], dataset, baseline="tuned")
        assert report.verdict("base").startswith("base is worse than tuned in nDCG@10: −0.")  # noqa: RUF001
        assert [run.name for run in report.runs] == ["tuned", "base"]

    def test_few_queries_show_nothing(self) -> None:
        dataset = make_dataset(25)
        a = make_run("a", dataset, [2] * 25)
        b = make_run("b", dataset, [1, 1, *[2] * 23])
        verdict = Report([a, b], dataset).verdict("b")
        assert verdict.startswith("b and a: no difference in nDCG@10 that 25 queries could show")

    def test_one_query(self) -> None:
        dataset = make_dataset(1)
        run = make_run("a", dataset, [1], depth=1)
        other = make_run("b", dataset, [1], depth=1)
        assert "that 1 query could show" in Report([run, other], dataset).verdict("b")

    def test_other_metrics_are_said_apart(self, report: Report) -> None:
        words = report.other_metrics("tuned")
        assert "recall@10" in words
        assert "nDCG@10" not in words

    def test_the_baseline_has_no_verdict(self, report: Report) -> None:
        with pytest.raises(ArgumentError, match="'base' is the baseline"):
            report.verdict("base")


class TestHolm:
    def test_known_values(self) -> None:
        # R: p.adjust(c(.01, .04, .03, .005), "holm")
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([]) == []

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
    def test_never_smaller_and_order_kept(self, p_values: list[float]) -> None:
        adjusted = holm(p_values)
        assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
        in_order = [a for _, a in sorted(zip(p_values, adjusted, strict=True))]
        assert all(a <= b for a, b in pairwise(in_order))
        assert min(adjusted) == pytest.approx(min(1, len(p_values) * min(p_values)))

    def test_the_family_is_the_whole_report(
        self, base: Evaluation, tuned: Evaluation, dataset: EmbeddingQAFinetuneDataset
    ) -> None:
        other = make_run("other", dataset, [1, 2, 3, 5, 9] * 8)
        report = Report([base, tuned, other], dataset)
        assert report.comparisons == 2 * len(METRICS)
        cells = [
            c.difference for name in ("tuned", "other") for c in report.measures[name].values()
        ]
        assert [c.p_adjusted for c in cells if c] == holm([c.p_value for c in cells if c])


class TestChanges:
    def test_ranks_down_to_the_shallower_run(self) -> None:
        dataset = make_dataset(30)
        deep = make_run("deep", dataset, [1, 15, 15, None] + [1] * 26, depth=20)
        short = make_run("short", dataset, [2, None, 3, None] + [1] * 26, depth=10)
        ranks = Report([deep, short], dataset).ranks("short")
        assert ranks.depth == 10
        assert ranks.pairs[:4] == [(1, 2), (None, None), (None, 3), (None, None)]
        assert (ranks.improved, ranks.worse, ranks.same) == (1, 1, 28)

    def test_best_of_several_relevant_documents(self) -> None:
        dataset = EmbeddingQAFinetuneDataset(
            queries={"q": "?"},
            corpus={"a": "1", "b": "2", "c": "3"},
            relevant_docs={"q": ["a", "b"]},
        )
        run = make_run("run", dataset, [3], depth=3, metrics=["mrr"])  # b, c, a
        assert Report([run, run.model_copy(update={"name": "x"})], dataset).ranks("x").pairs == [
            (1, 1)
        ]

    def test_gained_and_lost(self, report: Report) -> None:
        gained, lost = report.gained("tuned"), report.lost("tuned")
        assert len(gained) == len(lost) == 5
        assert all(change.change == gained[0].change > 0 for change in gained)
        assert gained[0].rank_before == 3
        assert gained[0].rank_after == 1
        assert {(change.rank_before, change.rank_after) for change in lost} == {(1, 2)}

    def test_no_gain_is_no_gain(
        self, base: Evaluation, dataset: EmbeddingQAFinetuneDataset
    ) -> None:
        same = base.model_copy(update={"name": "same"})
        report = Report([base, same], dataset)
        assert report.gained("same") == report.lost("same") == []
        assert "No query gained." in report.to_html()


class TestTable:
    @pytest.mark.parametrize("width", [30, 60, 80, 200])
    def test_whole_at_any_width(self, report: Report, width: int) -> None:
        text = shown(report, width)
        assert "…" not in text
        assert all(len(line) <= width for line in text.splitlines())
        for metric in METRICS:
            assert metric_label(metric) in text

    def test_rows_are_runs_and_columns_metrics(self, report: Report) -> None:
        table = report.table()
        assert table.row_count == 2
        assert len(table.columns) == 1 + len(METRICS)

    def test_names_are_no_markup(
        self, base: Evaluation, dataset: EmbeddingQAFinetuneDataset
    ) -> None:
        name = "[bold]x[/red]\x1b[2J"
        run = base.model_copy(update={"name": name})
        text = shown(Report([base, run], dataset), 200)
        assert "[bold]x[/red]" in text
        assert "\x1b" not in text


class TestJson:
    def test_round_trip(self, report: Report, tmp_path) -> None:
        report.save_json(tmp_path / "report.json")
        content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert content == report.to_dict()
        assert content["baseline"] == "base"
        tuned = content["runs"][1]
        assert tuned["outcome"] == "better"
        assert tuned["metrics"]["ndcg@10"]["difference"]["p_adjusted"] < 0.05
        assert tuned["ranks"] == {"depth": 20, "improved": 32, "same": 0, "worse": 8}


class TestHtml:
    def test_loads_nothing(self, report: Report) -> None:
        page = Page(report.to_html())
        assert not {"script", "link", "img", "iframe", "base"} & set(page.tags)
        assert all(link.startswith("#") for link in page.links)
        html = report.to_html()
        assert "default-src 'none'" in html
        assert "@import" not in html
        assert not re.search(r"url\((?!#)", html)

    def test_ids_are_unique_and_found(
        self, base: Evaluation, tuned: Evaluation, dataset: EmbeddingQAFinetuneDataset
    ) -> None:
        other = base.model_copy(update={"name": "other"})
        html = Report([base, tuned, other], dataset).to_html()
        page = Page(html)
        assert page.tags.count("svg") == 4
        assert len(set(page.ids)) == len(page.ids)
        references = {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]+)\)", html))
        assert references <= set(page.ids)

    def test_texts_cannot_break_it(self, dataset: EmbeddingQAFinetuneDataset) -> None:
        runs = [
            make_run(f"{kind} {NASTY}", dataset, [rank] * 40) for kind, rank in (("a", 3), ("b", 1))
        ]
        html = Report(runs, dataset, title=NASTY).to_html()
        html.encode("utf-8")
        page = Page(html)
        assert "script" not in page.tags
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", html)
        seen = "<script>alert(1)</script> & \"'> \ufffd\ufffd[31m\ufffd $x^2$ {{ 7 * 7 }} 数 ð"
        for text in (seen, f"question 0 {seen}", f"document 0 {seen}", f"b {seen}"):
            assert text in page.text

    def test_what_stood_at_rank_one(self, report: Report) -> None:
        text = " ".join(Page(report.to_html()).text.split())
        assert "Rank 1 before" in text
        assert "not relevant" in text
        assert "rank 3 → rank 1" in text

    def test_light_and_dark_colours_come_from_the_page(self, report: Report) -> None:
        html = report.to_html()
        assert "prefers-color-scheme: dark" in html
        used = set(re.findall(r"var\((--[\w-]+)\)", html))
        dark, light = html.split("prefers-color-scheme: dark")[1], html.split("@media")[0]
        for variable in used:
            assert f"{variable}:" in light
            assert f"{variable}:" in dark
        assert "#0a0b" not in html

    def test_the_page_names_the_correction(self, report: Report) -> None:
        assert "Holm’s method for all 4 comparisons" in Page(report.to_html()).text  # noqa: RUF001

    def test_one_run(self, base: Evaluation, dataset: EmbeddingQAFinetuneDataset) -> None:
        report = Report([base], dataset)
        page = Page(report.to_html())
        assert page.tags.count("svg") == 1
        assert "Holm" not in page.text
        assert "Holm" not in shown(report, 80)

    def test_a_metric_that_one_run_lacks(
        self, base: Evaluation, dataset: EmbeddingQAFinetuneDataset
    ) -> None:
        more = make_run("more", dataset, [1] * 40, metrics=[*METRICS, "precision@5"])
        report = Report([base, more], dataset)
        assert report.metrics[-1] == "precision@5"
        assert report.measures["more"]["precision@5"].difference is None
        assert "precision@5" in Page(report.to_html()).text
        assert "precision@5" in shown(report, 80)

    def test_the_old_page_survives_a_failure(self, report: Report, tmp_path, monkeypatch) -> None:
        path = tmp_path / "report.html"
        path.write_text("old")
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
        with pytest.raises(OSError, match="disk full"):
            report.save_html(path)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
    def test_a_missing_extra_is_named(self, report: Report, monkeypatch, module: str) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=r"pip install 'ft-core\[report\]'"):
            report.to_html()

    def test_pyplot_is_left_alone(self) -> None:
        code = (
            "import sys; from ft_core.report.plots import ranks_plot\n"
            "assert not {'matplotlib', 'jinja2', 'llama_index'} & sys.modules.keys()\n"
            "from ft_core.report.comparison import RankChanges\n"
            "ranks = RankChanges(1, [(1, None), (None, 1)])\n"
            "assert ranks_plot(ranks, prefix='a').startswith('<svg')\n"
            "assert 'matplotlib.pyplot' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestRefusals:
    def test_no_run(self, dataset: EmbeddingQAFinetuneDataset) -> None:
        with pytest.raises(ArgumentError, match="evaluations: is empty"):
            Report([], dataset)

    def test_two_of_one_name(self, base: Evaluation, dataset: EmbeddingQAFinetuneDataset) -> None:
        with pytest.raises(ArgumentError, match="two runs are called 'base'"):
            Report([base, base], dataset)

    def test_another_dataset(self, base: Evaluation) -> None:
        with pytest.raises(ArgumentError, match="'base' was evaluated on another dataset"):
            Report([base], make_dataset(39))

    def test_unknown_baseline(self, base: Evaluation, dataset: EmbeddingQAFinetuneDataset) -> None:
        with pytest.raises(ArgumentError, match=r"baseline: no run is called 'x'.*'base'"):
            Report([base], dataset, baseline="x")

    def test_unknown_primary(self, base: Evaluation, dataset: EmbeddingQAFinetuneDataset) -> None:
        with pytest.raises(ArgumentError, match=r"primary: 'ndcg@5' is not a metric of every run"):
            Report([base], dataset, primary="ndcg@5")

    def test_nothing_in_common(self, dataset: EmbeddingQAFinetuneDataset) -> None:
        a = make_run("a", dataset, [1] * 40, metrics=["mrr"])
        b = make_run("b", dataset, [1] * 40, metrics=["map"])
        with pytest.raises(ArgumentError, match="no metric in common"):
            Report([a, b], dataset)

    def test_unknown_run(self, report: Report) -> None:
        with pytest.raises(ArgumentError, match="no run is called 'x'"):
            report.ranks("x")


class TestText:
    def test_numbers(self) -> None:
        assert number(-0.0001, sign=True) == "+0.000"
        assert number(-0.5) == "−0.500"  # noqa: RUF001
        assert number(float("nan")) == "n/a"
        assert p_value(0.0004) == "p < 0.001"
        assert p_value(0.05) == "p = 0.050"

    def test_labels(self) -> None:
        assert metric_label("hit_rate@5") == "hit rate@5"
        assert metric_label("map") == "MAP"
        assert metric_label("precision@3") == "precision@3"
        assert listed(["a", "b", "c"]) == "a, b and c"
        assert listed(["a"]) == "a"

    def test_excerpt(self) -> None:
        assert excerpt("one two\n\tthree", 100) == "one two three"
        assert excerpt("one two three", 9) == "one two …"
        assert excerpt("数" * 20, 10) == "数" * 10 + " …"

    @given(st.text())
    def test_printable_can_always_be_written(self, text: str) -> None:
        result = printable(text)
        result.encode("utf-8")
        assert len(result) == len(text)
        assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e]", result)

    def test_half_a_surrogate_pair(self) -> None:
        assert printable("\ud800x") == "\ufffdx"
