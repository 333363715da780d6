defmodule VLLM.ToolCallDelta do
  @moduledoc """
  What one step of a stream adds to a call of a tool (`VLLM.ToolCall`).

    * `:index` - which of the message's calls it belongs to, from 0
    * `:id`, `:name` - come once, with the beginning of the call; nil after it
    * `:arguments` - JSON text to append; may be empty
  """

  defstruct [:index, :id, :name, arguments: ""]

  @type t :: %__MODULE__{
          index: non_neg_integer(),
          id: String.t() | nil,
          name: String.t() | nil,
          arguments: String.t()
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    %__MODULE__{
      index: wire["index"],
      id: wire["id"],
      name: wire["name"],
      arguments: wire["arguments"]
    }
  end
end
