"""Token ids that every vocabulary has, before the pieces of its text; how long identifiers are."""

PAD_ID = 0  # padding, and the start of a target
EOS_ID = 1  # end of sequence
UNK_ID = 2  # a character that the vocabulary lacks

LONGEST_IDENTIFIER = 64  # tokens, all counted, that a trie can hold
