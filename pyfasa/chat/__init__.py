"""`pyfasa chat`: a conversation with a model about long documents, in a terminal or through a pipe."""
