defmodule VLLM.MessageDelta do
  @moduledoc """
  What one step of `VLLM.chat_stream/3` adds to the model's message (`VLLM.ChatMessage`).

    * `:content` - to append to what it says; may be empty
    * `:reasoning` - to append to what it thinks; may be empty
    * `:tool_calls` - a list of `VLLM.ToolCallDelta`s
  """

  alias VLLM.ToolCallDelta

  defstruct content: "", reasoning: "", tool_calls: []

  @type t :: %__MODULE__{
          content: String.t(),
          reasoning: String.t(),
          tool_calls: [ToolCallDelta.t()]
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    %__MODULE__{
      content: wire["content"],
      reasoning: wire["reasoning"],
      tool_calls: Enum.map(wire["tool_calls"], &ToolCallDelta.from_wire/1)
    }
  end
end
