defmodule VLLM.Conversation do
  @moduledoc false
  # Conversations as users give them, for the wire.

  alias VLLM.{ChatMessage, Error, Params, ToolCall}

  @type message :: ChatMessage.t() | keyword() | %{optional(atom() | String.t()) => term()}
  @type t :: [message()]

  @example "`[%{role: \"user\", content: \"Hello!\"}]`"

  @doc """
  One conversation or a list of them as a list for the wire, and which of the
  two it was.
  """
  @spec to_wire(t() | [t()]) :: {:ok, :one | :many, [[map()]]} | {:error, Error.t()}
  def to_wire([first | _] = given) do
    many? = is_list(first) and not message?(first)
    conversations = if many?, do: given, else: [given]

    case Params.each(conversations, &conversation/1) do
      {:ok, wire} -> {:ok, if(many?, do: :many, else: :one), wire}
      {:error, error, index} -> {:error, at(error, index)}
    end
  end

  def to_wire(_other), do: {:error, at(not_a_conversation(), 0)}

  defp at(error, index), do: %{error | details: Map.put(error.details, "prompt_index", index)}

  # A keyword list is one message, also where a conversation was meant.
  defp conversation([{name, _} | _]) when is_atom(name), do: {:error, not_a_conversation()}

  defp conversation([_ | _] = messages) do
    with {:error, fault, index} <- Params.each(messages, &message/1) do
      details = %{"message_index" => index}
      {:error, Error.new(:invalid_prompt, "Message #{index} #{fault}", details)}
    end
  end

  defp conversation(_other), do: {:error, not_a_conversation()}

  defp not_a_conversation do
    Error.new(
      :invalid_prompt,
      "A conversation is a list of messages, with at least one: #{@example}."
    )
  end

  defp message(message) do
    if message?(message) do
      message = plain(message)

      case message["role"] do
        role when is_binary(role) and role != "" ->
          {:ok, message}

        _ ->
          {:error, "has no `role`, such as \"system\", \"user\", \"assistant\" or \"tool\"."}
      end
    else
      {:error,
       "is not a map with `role` and `content`; got #{inspect(message, limit: 5, printable_limit: 80)}."}
    end
  end

  defp message?(%ChatMessage{}), do: true
  defp message?(term) when is_struct(term), do: false
  defp message?(term), do: is_map(term) or (term != [] and Keyword.keyword?(term))

  @doc """
  A nested value with string keys, where users may have written atoms, keyword
  lists and messages of this library.
  """
  @spec plain(term()) :: term()
  def plain(%ChatMessage{} = message) do
    calls = Enum.map(message.tool_calls, &plain/1)

    %{
      "role" => message.role,
      "content" => message.content,
      "reasoning" => message.reasoning,
      "tool_calls" => if(calls == [], do: nil, else: calls)
    }
    |> Map.reject(fn {name, value} -> name != "content" and is_nil(value) end)
  end

  def plain(%ToolCall{} = call) do
    %{
      "id" => call.id,
      "type" => "function",
      "function" => %{"name" => call.name, "arguments" => call.arguments}
    }
  end

  def plain(%_{} = struct), do: struct
  def plain(%{} = map), do: Map.new(map, fn {name, value} -> {key(name), plain(value)} end)

  def plain([{name, _} | _] = list) when is_atom(name) do
    if Keyword.keyword?(list), do: plain(Map.new(list)), else: list
  end

  def plain(list) when is_list(list), do: Enum.map(list, &plain/1)

  def plain(atom) when is_atom(atom) and atom not in [nil, true, false],
    do: Atom.to_string(atom)

  def plain(value), do: value

  defp key(name) when is_atom(name), do: Atom.to_string(name)
  defp key(name), do: name
end
