"""The functions that a query may call.

A list of what is allowed, not of what is forbidden: PostgreSQL alone has some three thousand
functions, extensions add more, and among them are readers and writers of files
(`pg_read_file`, `lo_export`), runners of SQL in a string (`query_to_xml`, `dblink`), sleepers
and killers of other sessions. A list of dangers would be out of date on the day it is written; a
list of harmless ones only ever costs a refused query, and `functions=` adds to it.

Not listed although they read nothing: what makes a large value of a small query (`repeat`,
`zeroblob`, PostgreSQL's `format`), and what tells of the server (`version`, `current_setting`).
"""

from __future__ import annotations

_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


def fold_ascii(name: str) -> str:
    """Return a name with its ASCII letters in lower case, and all others as they are."""
    return name.translate(_LOWER)


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


_COMMON = words(
    """
    abs acos acosh any_value ascii asin asinh atan atan2 atanh avg bit_length cbrt ceil ceiling
    char char_length character_length chr coalesce concat concat_ws cos cosh cot count cume_dist
    current_date current_time current_timestamp date date_part date_trunc degrees dense_rank exp
    extract first_value floor glob greatest group_concat hex if ifnull iif initcap instr json_agg
    json_array_length json_object lag last_value lead least left length like ln localtime
    localtimestamp log log10 log2 lower ltrim max md5 min mod nth_value ntile nullif octet_length
    percent_rank pi position pow power radians random rank regexp_like replace reverse right round
    row_number rtrim sign sin sinh soundex split_part sqrt stddev stddev_pop stddev_samp string_agg
    strpos substr substring sum tan tanh time trim trunc upper var_pop var_samp variance
    """
)

_SQLITE = words(
    """
    datetime format json json_array json_each json_extract json_group_array json_group_object
    json_quote json_tree json_type json_valid julianday likelihood likely printf quote strftime
    timediff total typeof unhex unicode unixepoch unlikely
    """
)

_POSTGRES = words(
    """
    age array_agg array_append array_cat array_length array_lower array_ndims array_position
    array_positions array_prepend array_remove array_replace array_to_string array_upper bit_and
    bit_or bool_and bool_or btrim cardinality clock_timestamp corr cosine_distance covar_pop
    covar_samp date_bin daterange div every gcd gen_random_uuid generate_series
    generate_subscripts grouping inner_product int4range int8range isempty isfinite
    json_array_elements json_array_elements_text json_build_array json_build_object json_each
    json_each_text json_extract_path json_extract_path_text json_object_agg json_object_keys
    json_strip_nulls json_to_recordset json_typeof jsonb_agg jsonb_array_elements
    jsonb_array_elements_text jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each
    jsonb_each_text jsonb_extract_path jsonb_extract_path_text jsonb_object_agg jsonb_object_keys
    jsonb_path_exists jsonb_path_query jsonb_pretty jsonb_strip_nulls jsonb_to_recordset
    jsonb_typeof justify_days justify_hours justify_interval l2_distance lcm levenshtein lower_inc
    lower_inf lpad make_date make_interval make_time make_timestamp make_timestamptz mode now
    num_nonnulls num_nulls numrange overlay percentile_cont percentile_disc pg_typeof
    phraseto_tsquery plainto_tsquery range_merge regexp_count regexp_instr regexp_match
    regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table regexp_substr
    regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope row row_to_json rpad
    scale similarity starts_with statement_timestamp string_to_array string_to_table timezone
    to_char to_date to_hex to_json to_jsonb to_number to_timestamp to_tsquery to_tsvector
    transaction_timestamp translate ts_headline ts_rank ts_rank_cd tsrange tstzrange unaccent
    unnest upper_inc upper_inf vector_dims websearch_to_tsquery width_bucket word_similarity
    """
)

# What sqlglot calls functions that it knows, where that is no name above (it reads SQLite's
# `strftime` as `TimeToStr`), and the parts of the language that it counts among the functions.
_NODES = words(
    """
    And Array ArrayConcat ArrayContainedBy ArrayContains ArrayContainsAll ArrayOverlaps
    ArraySize BitwiseAndAgg BitwiseOrAgg Case Cast Collate CurrentDate CurrentTime
    CurrentTimestamp Exists Explode ExplodingGenerateSeries GroupConcat JSONArrayAgg
    JSONBContains JSONBContainsAllTopKeys JSONBContainsAnyTopKeys JSONBContainsTopKey
    JSONBExtract JSONBExtractScalar JSONBObjectAgg JSONExtract JSONExtractScalar JSONObject
    JSONObjectAgg JSONType LogicalAnd LogicalOr MatchAgainst Or Pad RegexpILike RegexpLike
    StrPosition StrToDate StrToTime TimeFromParts TimeToStr TimestampFromParts TimestampTrunc
    Trim TsOrDsToTimestamp Typeof UnixToTime Unnest Uuid Variance VariancePop
    """
)

_OF_DIALECT = {"sqlite": _SQLITE, "postgres": _POSTGRES}


def allowed_functions(dialect: str) -> frozenset[str]:
    """Return the lower-case names of the functions that a query of this dialect may call."""
    return _COMMON | _OF_DIALECT.get(dialect, frozenset())


def is_allowed_node(kind: str) -> bool:
    """Return whether sqlglot's class of this name stands for an allowed function."""
    return kind in _NODES
