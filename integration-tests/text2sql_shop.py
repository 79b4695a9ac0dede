"""A small shop as a SQLite database, and questions about it with their SQL."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from ft_core.datasets import Text2SQLDataset

SHOP = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, joined DATE);
CREATE TABLE orders (
  id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers (id), amount REAL,
  placed DATE, status TEXT
);
INSERT INTO customers VALUES
  (1, 'Ane', 'Oslo', '2021-05-02'), (2, 'Bjarte', 'Bergen', '2022-01-17'),
  (3, 'Carla', 'Oslo', '2022-08-30'), (4, 'Didrik', 'Tromsø', '2023-03-11'),
  (5, 'Eli', 'Bergen', '2024-02-06');
INSERT INTO orders VALUES
  (1, 1, 120.5, '2024-01-05', 'paid'), (2, 1, 35, '2024-03-19', 'open'),
  (3, 2, 260, '2024-02-11', 'paid'), (4, 3, 18.9, '2024-02-28', 'returned'),
  (5, 3, 75, '2024-04-02', 'paid'), (6, 4, 410, '2024-04-15', 'open');
"""

PAIRS = {
    "How many customers are there?": "SELECT count(*) FROM customers",
    "How many orders are open?": "SELECT count(*) FROM orders WHERE status = 'open'",
    "Which customers live in Bergen?": "SELECT name FROM customers WHERE city = 'Bergen'",
    "What was the largest order?": "SELECT max(amount) FROM orders",
    "Name the cities that customers live in.": "SELECT DISTINCT city FROM customers",
    "Who joined before 2022?": "SELECT name FROM customers WHERE joined < '2022-01-01'",
    "What have all paid orders brought in?": (
        "SELECT sum(amount) FROM orders WHERE status = 'paid'"
    ),
    "How many customers does each city have?": (
        "SELECT city, count(*) FROM customers GROUP BY city"
    ),
    "Who has never ordered anything?": (
        "SELECT name FROM customers WHERE id NOT IN (SELECT customer_id FROM orders)"
    ),
    "Who placed the latest order?": (
        "SELECT customers.name FROM customers JOIN orders ON orders.customer_id = customers.id "
        "ORDER BY orders.placed DESC LIMIT 1"
    ),
    "Which orders are above 100?": "SELECT id FROM orders WHERE amount > 100",
    "What is the mean amount of the orders of Ane?": (
        "SELECT avg(orders.amount) FROM orders JOIN customers ON orders.customer_id = "
        "customers.id WHERE customers.name = 'Ane'"
    ),
}
HELD_OUT = {
    "How many orders were returned?": "SELECT count(*) FROM orders WHERE status = 'returned'",
    "Which customers live in Oslo?": "SELECT name FROM customers WHERE city = 'Oslo'",
    "Who joined last?": "SELECT name FROM customers ORDER BY joined DESC LIMIT 1",
    "What was the smallest order?": "SELECT min(amount) FROM orders",
}


def write_shop(folder: Path) -> None:
    """Write `shop.db`, `train.jsonl` and `val.jsonl`."""
    with closing(sqlite3.connect(folder / "shop.db")) as connection:
        connection.executescript(SHOP)
    for name, pairs in {"train": PAIRS, "val": HELD_OUT}.items():
        examples = [{"question": q, "sql": s, "database": "shop"} for q, s in pairs.items()]
        Text2SQLDataset.coerce(examples).save(folder / f"{name}.jsonl")


def shop_pairs(messages: list[dict[str, Any]]) -> str:
    """Answer as an LLM that is asked for questions about the shop, or for the SQL of one."""
    prompt = messages[-1]["content"]
    known = PAIRS | HELD_OUT
    asked = re.findall(r"Question: (.+)", prompt)
    if asked:
        return known.get(asked[-1].strip(), "SELECT count(*) FROM customers")
    return json.dumps([{"question": q, "sql": s} for q, s in known.items()])
