import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_core.errors import ArgumentError, DatasetError
from ft_core.generation.folder import read_folder
from ft_core.generation.sentences import split_sentences


def make_pdf(*pages):
    """Return the bytes of a PDF with a line of text on each page, or none."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for i, text in enumerate(pages):
        content = f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET"
        objects += [
            "<</Type/Page/Parent 2 0 R/MediaBox[0 0 400 144]/Resources<</Font<</F1 3 0 R>>>>"
            f"/Contents {5 + 2 * i} 0 R>>",
            f"<</Length {len(content)}>>stream\n{content}\nendstream",
        ]
    pdf, places = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(pdf))
        pdf += f"{number} 0 obj{body}endobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    start = len(pdf)
    pdf += f"xref\n0 {size}\n0000000000 65535 f \n{table}"
    pdf += f"trailer<</Root 1 0 R/Size {size}>>\nstartxref\n{start}\n%%EOF\n"
    return pdf.encode("latin-1")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide" / "pumps.md").write_text("# Pumps\n\nThe pump <P1> runs at night.\n")
    (tmp_path / "notes.txt").write_text("\ufeffLes vannes s'ouvrent à gauche.", encoding="utf-8")
    (tmp_path / "manual.PDF").write_bytes(make_pdf("The hydrant is flushed every spring.", ""))
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / ".hidden.txt").write_text("secret")
    (tmp_path / "blank.txt").write_text(" \n")
    return tmp_path


def test_reads_markdown_text_and_pdf(folder):
    pytest.importorskip("llama_index.readers.file")
    found = read_folder(folder)
    assert {node.metadata["file_name"]: node.text for node in found.nodes} == {
        "guide/pumps.md": "# Pumps\n\nThe pump <P1> runs at night.",
        "manual.PDF": "The hydrant is flushed every spring.",
        "notes.txt": "Les vannes s'ouvrent à gauche.",
    }
    assert found.files == 4
    assert found.empty == ["blank.txt", "manual.PDF, page 2"]


def test_ids_are_the_same_in_every_run_and_unique(tmp_path):
    (tmp_path / "a.txt").write_text("One sentence here. " * 200)
    (tmp_path / "b.txt").write_text("One sentence here.")
    ids = [node.node_id for node in read_folder(tmp_path, chunk_size=20).nodes]
    assert len(ids) == len(set(ids)) > 10
    assert ids == [node.node_id for node in read_folder(tmp_path, chunk_size=20).nodes]
    (tmp_path / "0.txt").write_text("A new first file.")
    assert ids == [node.node_id for node in read_folder(tmp_path, chunk_size=20).nodes][1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 0}, "chunk_size: must be at least 1"),
        ({"chunk_size": 10, "chunk_overlap": 10}, "chunk_overlap: must be from 0 to below"),
    ],
)
def test_bad_sizes(folder, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        read_folder(folder, **arguments)


def test_bad_folders(tmp_path):
    with pytest.raises(ArgumentError, match="is no folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(ArgumentError, match=r"holds no \.md, \.txt, \.pdf file"):
        read_folder(tmp_path)
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ArgumentError, match=r"no file in .* holds any text: a\.txt"):
        read_folder(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    pytest.importorskip("llama_index.readers.file")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DatasetError, match=r"a\.txt: byte 3 is not UTF-8"):
        read_folder(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.pdf").write_bytes(b"no pdf at all")
    with pytest.raises(DatasetError, match=r"b\.pdf: is no PDF that can be read"):
        read_folder(tmp_path)


def test_sentences():
    text = 'He said "Stop." Then 1.5 m. Really?\n\nNext!  这是一句。那是二句。The end'
    assert [part.strip() for part in split_sentences(text)] == [
        'He said "Stop."',
        "Then 1.5 m.",
        "Really?",
        "Next!",
        "这是一句。",
        "那是二句。",
        "The end",
    ]


@given(st.text(alphabet='ab .!?。\n"', max_size=50))
def test_sentences_joined_are_the_text(text):
    assert "".join(split_sentences(text)) == text
