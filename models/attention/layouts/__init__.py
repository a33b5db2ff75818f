"""Who may see whom, one layout per file: factories `layout(site) -> Layout`."""
