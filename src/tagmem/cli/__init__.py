"""The command line: verbs and nouns in the family of `cxl` and `daxctl`, over the API's client."""
