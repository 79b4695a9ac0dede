"""SQL queries compared as texts: one spelling for what differs in nothing, order, hardness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from sqlglot import exp
from sqlglot.dialects.dialect import Dialect
from sqlglot.errors import ErrorLevel, UnsupportedError

from ft_text2sql.identifiers import dialect_name, ignores_case, quote_name
from ft_text2sql.statements import Names, Source, parse, resolve

if TYPE_CHECKING:
    from ft_text2sql.schema import Schema

Hardness = Literal["easy", "medium", "hard", "extra"]

_SPIDERS_AGGREGATES = (exp.Max, exp.Min, exp.Count, exp.Sum, exp.Avg)
_SEE_OUTPUTS = (exp.Order, exp.Group, exp.Having)
_NEGATED_INSIDE = (exp.In, exp.Between, exp.Like, exp.ILike, exp.Is)


def normalise_sql(sql: str, dialect: str = "sqlite", schema: Schema | None = None) -> str:
    """Return a query in one spelling, for an exact match that form cannot fail.

    The result is SQL of the same meaning; it reads well enough to train on. Gone are
    differences of

    - case, white space, comments, a closing semicolon, and quotes that a name does not need;
    - aliases: a table goes by its name; where a statement needs two names for one table, and
      for subqueries, by t1, t2 in the order of the text; an alias of an output column goes
      where nothing refers to it;
    - qualification: a column has its table's name where the SELECT reads from several, and
      not where it reads from one. A bare column of several tables is qualified only with a
      `schema` that has it once;
    - spelling: != for <>, INNER JOIN, LEFT OUTER JOIN, CROSS JOIN for a comma, ASC, brackets
      around one value.

    Spider's exact match resolves aliases and ignores case in the same way (Yu et al. 2018,
    "Spider: A Large-Scale Human-Labeled Dataset for Complex and Cross-Domain Semantic Parsing
    and Text-to-SQL Task"), and text2sql-data is published in such a form (Finegan-Dollak et
    al. 2018, "Improving Text-to-SQL Evaluation Methodology"). Unlike Spider's, this match
    counts the values and the order of conditions and columns: it is stricter, and it reads
    any SQL.

    Args:
        sql: one query. What sqlglot cannot read, or is too long or too deeply nested (see
            `ft_text2sql.statements.parse`), is compared as text but for white space and a
            closing semicolon.
        dialect: as sqlglot or SQLAlchemy names it.
        schema: the tables; only bare columns need it.

    Raises:
        ArgumentError: an unknown dialect.
    """
    dialect = dialect_name(dialect)
    tree = parse(sql, dialect)
    if tree is None:
        return _as_text(sql)
    try:
        _drop_output_aliases(tree)
        names = resolve(tree)
        _qualify(tree, names, schema)
        _rename_sources(names)
        _respell(tree, dialect)
        return _generate(tree, dialect)
    except (RecursionError, UnsupportedError):  # no SQL of this dialect after all
        return _as_text(sql)


def _as_text(sql: str) -> str:
    return " ".join(sql.split()).rstrip("; ")


def asks_for_order(sql: str, dialect: str = "sqlite") -> bool:
    """Return whether the rows of a query come in an order: ORDER BY at the outermost level.

    One in a subquery or in a window orders nothing that the reader sees. Spider's test-suite
    evaluation takes "order by" anywhere in the text for an order; so does this function for
    what sqlglot cannot read.

    Raises:
        ArgumentError: an unknown dialect.
    """
    tree: exp.Expr | None = parse(sql, dialect)
    if tree is None:
        return "order by" in " ".join(sql.lower().split())
    while isinstance(tree, exp.Subquery | exp.Paren):
        if tree.args.get("order"):
            return True
        tree = tree.this
    return tree is not None and bool(tree.args.get("order"))


def hardness(sql: str, dialect: str = "sqlite") -> Hardness:
    """Return how hard a query is: the levels of Spider's evaluation.

    Counts what `eval_hardness` of `evaluation.py` in taoyds/spider counts, its oddities
    included: a NOT in WHERE counts as an aggregate, and so does each AND or OR in HAVING; of a
    UNION, INTERSECT or EXCEPT only the first SELECT is looked into; a subquery in FROM counts
    as a table. What Spider's own grammar lacks counts as the nearest that it has: a subquery
    in the SELECT list or WITH as a nested query, a comma in FROM as a join.

    What sqlglot cannot read, or is too long or too deeply nested, is "extra".

    Raises:
        ArgumentError: an unknown dialect.
    """
    tree = parse(sql, dialect)
    if tree is None:
        return "extra"
    compound = isinstance(tree, exp.SetOperation)
    select = _first_select(tree)
    if select is None:
        return "extra"
    where, where_joints = _conditions(select.args.get("where"))
    having, having_joints = _conditions(select.args.get("having"))
    joins = [_conditions(join.args.get("on")) for join in select.args.get("joins", [])]
    conditions = [*where, *having, *(one for found, _ in joins for one in found)]
    joints = [*where_joints, *having_joints, *(one for _, found in joins for one in found)]
    grouped = select.args["group"].expressions if select.args.get("group") else []
    order = None if compound else select.args.get("order")
    clauses = (where, grouped, order, None if compound else select.args.get("limit"))
    components = sum(map(bool, clauses)) + len(joins) + joints.count("or")
    components += sum(isinstance(_unnegated(one), exp.Like | exp.ILike) for one in conditions)
    inner = [*conditions, *select.expressions, *tree.args.get("with_", exp.With()).expressions]
    nested = int(compound) + sum(_nested(one) for one in inner)
    aggregates = (
        sum(_aggregates(column) > 0 for column in select.expressions)
        + sum(isinstance(one, exp.Not) for one in [*where, *having])
        + len(having_joints)
        + (sum(map(_aggregates, order.expressions)) if order else 0)
    )
    others = (
        (aggregates > 1) + (len(select.expressions) > 1) + (len(where) > 1) + (len(grouped) > 1)
    )
    return _level(components, nested, others)


def _level(components: int, nested: int, others: int) -> Hardness:
    if nested == 0 and components <= 1 and others == 0:
        return "easy"
    if nested == 0 and ((components <= 1 and others <= 2) or (components <= 2 and others < 2)):
        return "medium"
    if nested == 0 and ((components <= 2 and others > 2) or (components == 3 and others <= 2)):
        return "hard"
    if nested <= 1 and components <= 1 and others == 0:
        return "hard"
    return "extra"


def _first_select(tree: exp.Expr) -> exp.Select | None:
    while isinstance(tree, exp.SetOperation | exp.Subquery | exp.Paren):
        tree = tree.this
    return tree if isinstance(tree, exp.Select) else None


def _conditions(clause: exp.Expr | None) -> tuple[list[exp.Expr], list[str]]:
    """Return the conditions of a clause, and the "and" and "or" between them."""
    conditions: list[exp.Expr] = []
    joints: list[str] = []
    waiting = [] if clause is None else [clause]
    while waiting:
        node = waiting.pop()
        if isinstance(node, exp.And | exp.Or):
            joints.append("or" if isinstance(node, exp.Or) else "and")
            waiting += [node.expression, node.this]
        elif isinstance(node, exp.Where | exp.Having) or (
            isinstance(node, exp.Paren | exp.Not)
            and isinstance(node.this.unnest(), exp.And | exp.Or)
        ):
            waiting.append(node.this)
        else:
            conditions.append(node.unnest())
    return conditions, joints


def _unnegated(condition: exp.Expr) -> exp.Expr:
    return condition.this.unnest() if isinstance(condition, exp.Not) else condition


def _nested(node: exp.Expr) -> int:
    """Return how many queries stand in a node, those within them not counted."""
    return sum(isinstance(inner, exp.Query) for inner in _outside_queries(node))


def _aggregates(node: exp.Expr) -> int:
    return sum(isinstance(inner, _SPIDERS_AGGREGATES) for inner in _outside_queries(node))


def _outside_queries(node: exp.Expr) -> Iterator[exp.Expr]:
    return node.walk(bfs=False, prune=lambda inner: isinstance(inner, exp.Query))


def _drop_output_aliases(tree: exp.Query) -> None:
    """Drop the aliases of the outermost SELECT's columns that nothing refers to."""
    if not isinstance(tree, exp.Select):
        return  # of a UNION they name the columns
    used = {column.name.casefold() for column in tree.find_all(exp.Column) if not column.table}
    for column in tree.expressions:
        if isinstance(column, exp.Alias) and column.alias.casefold() not in used:
            column.replace(column.this)


def _qualify(tree: exp.Query, names: Names, schema: Schema | None) -> None:
    """Give bare columns of several tables the one that has them."""
    if schema is None:
        return
    for column in tree.find_all(exp.Column):
        select = column.find_ancestor(exp.Select)
        if column.table or select is None or len(names.sources[id(select)]) < 2:
            continue
        if column.name.casefold() in _output_names(select):
            continue
        sources = names.sources[id(select)]
        having = [s for s in sources if s.table and schema.has_column(s.table, column.name)]
        if len(having) == 1 and all(source.table for source in sources):
            column.set("table", exp.to_identifier(having[0].name))
            having[0].local.append(column)


def _output_names(select: exp.Select) -> set[str]:
    return {c.alias.casefold() for c in select.expressions if isinstance(c, exp.Alias)}


def _rename_sources(names: Names) -> None:
    """Name each table and subquery, and the columns' qualifiers with it, in the one way."""
    sources = [source for found in names.sources.values() for source in found]
    taken = {source.table for source in sources}
    fresh = (
        name for n in range(1, len(sources) + len(taken) + 1) if (name := f"t{n}") not in taken
    )
    tables = Counter(source.table for source in sources)
    together = Counter((id(source.select), source.table) for source in sources)
    for source in sources:
        twice = together[id(source.select), source.table] > 1
        needs = not source.table or twice or (source.outer and tables[source.table] > 1)
        _rename(source, next(fresh) if needs else None, len(names.sources[id(source.select)]))


def _rename(source: Source, alias: str | None, sources: int) -> None:
    """Give a source this alias, or none; `sources` is how many its SELECT reads from."""
    given = source.node.args.get("alias")
    columns = given.columns if given is not None else []
    if alias is not None:
        name: exp.Expr = exp.to_identifier(alias)
        source.node.set("alias", exp.TableAlias(this=name, columns=columns))
    elif columns:
        return  # t AS a (x, y): the alias names columns, too, and stays
    else:
        name = source.node.this
        source.node.set("alias", None)
    outputs = _output_names(source.select)
    for column in source.local:
        # Behind ORDER BY a bare name is an output column's first.
        hidden = column.name.casefold() in outputs and column.find_ancestor(*_SEE_OUTPUTS)
        _set_qualifier(column, None if sources == 1 and not hidden else name)
    for column in source.outer:
        _set_qualifier(column, name)


def _set_qualifier(column: exp.Column, name: exp.Expr | None) -> None:
    column.set("table", None if name is None else name.copy())
    column.set("db", None)
    column.set("catalog", None)


def _respell(tree: exp.Query, dialect: str) -> None:
    for node in list(tree.walk()):
        if isinstance(node, exp.Identifier):
            name = node.name
            if ignores_case(dialect) or not node.quoted:
                name = name.casefold()
            node.replace(exp.Identifier(this=name, quoted=quote_name(name, dialect) != name))
        elif isinstance(node, exp.Anonymous):
            node.set("this", node.name.upper())
        elif isinstance(node, exp.Ordered) and node.args.get("desc") is False:
            node.set("desc", None)
        elif isinstance(node, exp.Join) and node.kind in ("INNER", "OUTER"):
            node.set("kind", None)
        elif isinstance(node, exp.Select):
            _write_commas(node)
    for paren in reversed(list(tree.find_all(exp.Paren))):  # inner ones first
        if _needs_no_brackets(paren):
            paren.replace(paren.this)


def _write_commas(select: exp.Select) -> None:
    """Write FROM a, b where all joins are such; sqlglot reads a comma as CROSS JOIN.

    To SQLite the two are not the same: of a CROSS JOIN it keeps the order of the tables, however
    slow that is (https://www.sqlite.org/optoverview.html, "Manual Control Of Query Plans").
    """
    joins = select.args.get("joins") or []
    if all(set(filter(join.args.get, join.args)) == {"this", "kind"} for join in joins) and all(
        join.kind == "CROSS" for join in joins
    ):
        for join in joins:
            join.set("kind", None)


def _needs_no_brackets(paren: exp.Paren) -> bool:
    inner, outer = paren.this, paren.parent
    if isinstance(outer, exp.Where | exp.Having | exp.Join | exp.Select | exp.Ordered | exp.Paren):
        return True
    if isinstance(outer, exp.Connector) and isinstance(inner, exp.Predicate):
        return True  # a condition among others; AND and OR are no predicates
    # To sqlglot AND and OR are functions, too.
    alone = exp.Column | exp.Literal | exp.Func | exp.Paren | exp.Null
    return isinstance(inner, alone) and not isinstance(inner, exp.Binary)


def _generate(tree: exp.Query, dialect: str) -> str:
    base = Dialect.get_or_raise(dialect).generator_class

    class Natural(base):  # type: ignore[misc, valid-type]
        """Writes x NOT IN (...) where sqlglot writes NOT x IN (...)."""

        def not_sql(self, expression: exp.Not) -> str:
            inner = expression.this
            if not isinstance(inner, _NEGATED_INSIDE):
                return str(super().not_sql(expression))
            whole, left = self.sql(inner), self.sql(inner.this)
            rest = whole[len(left) :].strip()
            if not whole.startswith(left):
                return str(super().not_sql(expression))
            if isinstance(inner, exp.Is):
                return f"{left} IS NOT{rest.removeprefix('IS')}"
            return f"{left} NOT {rest}"

    generator = Natural(dialect=dialect, comments=False, unsupported_level=ErrorLevel.RAISE)
    return str(generator.generate(tree))
