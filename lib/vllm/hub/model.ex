defmodule VLLM.Hub.Model do
  alias VLLM.Fields

  @fields [
    id: "its name on the hub, as `VLLM.llm/2` takes it",
    size: "what it takes on the disk, in bytes, all revisions together",
    incomplete:
      "how many of these belong to files that are not whole yet: a download that was interrupted",
    last_used: "when one of its files was last read or written, a `DateTime`",
    revisions: "the branches and tags that it was asked by, each with its commit, as a map",
    method: "by which it is quantized, as far as its config tells; `\"gguf\"` for GGUF files",
    path: "the folder of its newest revision; nil where no download of it has ended yet"
  ]

  @moduledoc """
  A model of the hub that is on this machine, from `VLLM.Hub.list/1`.

  #{Fields.docs(@fields)}
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{
          id: String.t(),
          size: non_neg_integer(),
          incomplete: non_neg_integer(),
          last_used: DateTime.t(),
          revisions: %{String.t() => String.t()},
          method: String.t() | nil,
          path: Path.t() | nil
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    model = struct!(__MODULE__, Fields.take(wire, @names))
    %{model | last_used: model.last_used |> trunc() |> DateTime.from_unix!()}
  end
end
