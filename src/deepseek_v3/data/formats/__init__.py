"""Reading documents from files of many formats, and writing them. `file_types.FORMATS` lists the formats."""
