"""The doctor: finds out which hop between a client and an API harms streams, and says what to change.

The probe (`origin`) takes the place of the API. The client (`examine`) asks it for streams through the hops, and notes
what arrives and when. `arrival` and `verdict` turn these observations into findings, without any I/O.
"""
