defmodule VLLM.Conversation do
  @moduledoc false
  # Conversations as users give them, for the wire.

  alias VLLM.{ChatMessage, Error, Params, Secrets, Wire}

  @type t :: VLLM.conversation()

  @example "`[%{role: \"user\", content: \"Hello!\"}]`"

  @doc """
  One conversation or a list of them as a list for the wire, and which of the
  two it was.
  """
  @spec to_wire(t() | [t()]) :: {:ok, :one | :many, [[map()]]} | {:error, Error.t()}
  def to_wire([first | _] = given) do
    many? = is_list(first) and not message?(first)
    conversations = if many?, do: given, else: [given]

    with false <- List.improper?(conversations),
         {:ok, wire} <- Params.each(conversations, &conversation/1) do
      {:ok, if(many?, do: :many, else: :one), wire}
    else
      {:error, error, index} -> {:error, at(error, index)}
      true -> {:error, at(not_a_conversation(), 0)}
    end
  end

  def to_wire(_other), do: {:error, at(not_a_conversation(), 0)}

  defp at(error, index), do: %{error | details: Map.put(error.details, "prompt_index", index)}

  # A keyword list is one message, also where a conversation was meant.
  defp conversation([{name, _} | _]) when is_atom(name), do: {:error, not_a_conversation()}

  defp conversation([_ | _] = messages) do
    with false <- List.improper?(messages),
         {:error, fault, index} <- Params.each(messages, &message/1) do
      details = %{"message_index" => index}
      {:error, Error.new(:invalid_prompt, "Message #{index} #{fault}", details)}
    else
      true -> {:error, not_a_conversation()}
      ok -> ok
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
    with true <- message?(message),
         {:ok, %{"role" => role} = wire} when is_binary(role) and role != "" <-
           Wire.encode(message) do
      {:ok, wire}
    else
      false ->
        {:error, "is not a map with `role` and `content`; got #{Secrets.inspect(message)}."}

      {:ok, _wire} ->
        {:error, "has no `role`, such as \"system\", \"user\", \"assistant\" or \"tool\"."}

      {:error, fault} ->
        {:error, Wire.describe(fault) <> "."}
    end
  end

  defp message?(%ChatMessage{}), do: true
  defp message?(term) when is_struct(term), do: false
  defp message?(term), do: is_map(term) or (term != [] and Keyword.keyword?(term))
end
