"""Define the contract of a pass: its inputs, its options and its outputs.

An artifact is a value whose content is the files it saves. A pass reads the artifacts that it requires and returns
those that it provides. A recipe is the list of passes with their options. These types know no particular pass.
"""
