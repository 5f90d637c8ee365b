"""Input that is no valid document: the table that keeps it, and the codes of reasons, repairs and skipped input."""

from __future__ import annotations

import pyarrow as pa

from deepseek_v3.utils.redaction import redact

# `place` is that of `RECORDS`. `offset` and `length` count bytes of the decompressed file, and are -1 if
# unknown. `records` is the number of records that the entry covers. `raw` holds the bytes of a short record if they
# are known.
QUARANTINED = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("records", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("raw", pa.binary()),
    ]
)
MAX_RAW_BYTES = 2**16

REASONS = {
    "empty": "the file holds no bytes, or none once decompressed",
    "unreadable": "the file cannot be opened or read: it vanished, or the disk reports an error",
    "truncated": "the file ends inside compressed data, a record or an array",
    "damaged": "the compressed data or the structure of the file is corrupt; everything before it was read",
    "too_long": "a line, file, row's text or payload has more bytes than `max_record_bytes`",
    "not_utf8": "bytes that are not UTF-8",
    "not_json": "a line or value that is not JSON",
    "not_csv": "a row of CSV or TSV with broken quotes, or with another number of fields than the header",
    "not_notebook": "a .ipynb file that is no Jupyter notebook, or that has a malformed cell",
    "not_xml": "a page in a dump of MediaWiki that is not well-formed, or that uses entities other than XML's own",
    "nesting": "JSON nested deeper than can be read (1,024 levels)",
    "not_object": "a JSON value that is not an object",
    "text_missing": "a record without the text field",
    "text_null": "a record whose text is null",
    "text_type": "a record whose text is not a string",
    "nul": "a text of which more than a tenth are NUL characters, the sign of binary data",
    "path": "a file in an archive whose path is not UTF-8, is absolute, or leads out of the archive by ..",
    "not_text": "a WARC record whose content type is not text, such as an image",
}

# What was repaired in records that are kept, and counted by these codes.
REPAIRS = {
    "id_qualified": "an id that several records have: it now starts with the name of its file",
    "id_as_text": "an id that is neither a string nor an integer: it was converted to text, bytes to hexadecimal",
    "nul": "a text with a few NUL characters: they were removed",
    "lone_surrogate": "JSON with one half of a surrogate pair, which no UTF-8 can express: it became U+FFFD",
    "number": "JSON with NaN or infinity, which became null, or a number beyond a double, which became text",
    "not_utf8": "bytes that are not UTF-8 in a field other than the text: they became U+FFFD",
    "metadata": "a value in another field, such as a date out of range, that JSON cannot hold: it became text",
}

# What is whole, and yet no document by the rules of its format; it is counted by these codes.
SKIPPED = {
    "http_status": "a WARC response with a status other than 200, such as a redirect or an error page",
    "redirect": "a page of MediaWiki that only redirects to another",
    "namespace": "a page of MediaWiki outside of the main namespace, such as a talk page or a template",
    "content_model": "a page of MediaWiki that is not wikitext, such as a style sheet",
    "member_format": "a file in an archive that is not one document by its name, such as an image or a table",
    "member_type": "a link, device, pipe or sparse file in an archive",
}


class InvalidRecord(Exception):  # noqa: N818 -- not a failure of the reader
    """Input that is not a valid document: a code of `REASONS`, and the details, in which secrets are masked."""

    def __init__(self, reason: str, error: str) -> None:
        self.reason, self.error = reason, redact(error)
        super().__init__(reason, self.error)
