[
  inputs: ["{mix,.formatter}.exs", "{config,lib,test,bench,examples}/**/*.{ex,exs}"],
  # Phoenix's, in examples/.
  locals_without_parens: [plug: :*, pipe_through: 1, live: 2, forward: 3, socket: 3]
]
