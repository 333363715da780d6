defmodule VLLM.ChatMessage do
  @moduledoc """
  What the model says in a conversation, as `VLLM.chat/3` gives it in the `:message` of a
  `VLLM.CompletionOutput`.

    * `:role` - `"assistant"`, or the role of the message that was continued
    * `:content` - what it says; nil if it only calls tools
    * `:reasoning` - what it thought before; nil without a `reasoning_parser:`
    * `:tool_calls` - a list of `VLLM.ToolCall`s; empty without `tools:` and a `tool_call_parser:`

  It is a message itself, so that a conversation goes on with it:

      messages = [%{role: "user", content: "Will it rain in Paris?"}]
      [output] = VLLM.chat!(llm, messages, tools: tools, tool_call_parser: "hermes")
      message = hd(output.outputs).message

      results =
        for call <- message.tool_calls do
          %{role: "tool", tool_call_id: call.id, content: MyApp.weather(call.parsed["city"])}
        end

      VLLM.chat!(llm, messages ++ [message | results], tools: tools, tool_call_parser: "hermes")
  """

  alias VLLM.ToolCall

  @behaviour VLLM.Wire

  defstruct [:role, :content, :reasoning, tool_calls: []]

  @type t :: %__MODULE__{
          role: String.t(),
          content: String.t() | nil,
          reasoning: String.t() | nil,
          tool_calls: [ToolCall.t()]
        }

  @doc false
  @spec from_wire(map() | nil) :: t() | nil
  def from_wire(nil), do: nil

  def from_wire(wire) do
    %__MODULE__{
      role: wire["role"],
      content: wire["content"],
      reasoning: wire["reasoning"],
      tool_calls: Enum.map(wire["tool_calls"], &ToolCall.from_wire/1)
    }
  end

  @doc false
  @impl VLLM.Wire
  # What a message does not have is not sent, but for its content.
  def __wire__(message) do
    calls = if message.tool_calls != [], do: message.tool_calls

    optional =
      for {name, value} <- [reasoning: message.reasoning, tool_calls: calls],
          value != nil,
          do: {name, value}

    [role: message.role, content: message.content] ++ optional
  end
end
