defmodule VLLM.ToolCall do
  @moduledoc """
  A call of a tool, as the model wants it made.

    * `:id` - to be given back as the `tool_call_id` of the message with the tool's result
    * `:name` - the function
    * `:arguments` - its arguments as the model wrote them, JSON
    * `:parsed` - the arguments as a map with string keys; nil if they are not a JSON object (models
      make mistakes), or one that is nested more than 64 deep or has integers of more than 64 bits
  """

  @behaviour VLLM.Wire

  defstruct [:id, :name, :arguments, :parsed]

  @type t :: %__MODULE__{
          id: String.t(),
          name: String.t(),
          arguments: String.t(),
          parsed: %{String.t() => term()} | nil
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    %__MODULE__{
      id: wire["id"],
      name: wire["name"],
      arguments: wire["arguments"],
      parsed: wire["parsed"]
    }
  end

  @doc false
  @impl VLLM.Wire
  def __wire__(call) do
    %{id: call.id, type: "function", function: %{name: call.name, arguments: call.arguments}}
  end
end
