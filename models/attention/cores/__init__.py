"""What a group of tokens computes, one core per file: factories `attention(site) -> Mixer`, named by conf/attention."""
