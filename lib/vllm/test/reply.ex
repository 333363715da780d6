defmodule VLLM.Test.Reply do
  @moduledoc false
  # What a script answers, as the steps in which it is given.

  alias VLLM.{ChatMessage, CompletionOutput, Error}

  @type step ::
          {:text, String.t()}
          | {:wait, non_neg_integer()}
          | {:done, %CompletionOutput{} | {:numbers, [number()]}}
          | {:error, Error.t()}
          | :hang
          | :die

  @doc "The steps of a reply; the last one ends the request, or never does."
  @spec steps(VLLM.Test.reply()) :: [step()]
  def steps(text) when is_binary(text), do: steps(%CompletionOutput{text: text})
  def steps({:text, text}) when is_binary(text), do: steps(text)

  def steps(%ChatMessage{} = message) do
    message = %{message | role: message.role || "assistant"}
    steps(%CompletionOutput{text: message.content || "", message: message})
  end

  def steps(%CompletionOutput{text: text} = completion) when is_binary(text) do
    unless String.valid?(text), do: raise(ArgumentError, "a reply is not valid UTF-8 text")
    [{:text, text}, {:done, %{completion | finish_reason: completion.finish_reason || "stop"}}]
  end

  def steps({:deltas, []}), do: steps("")

  # Only the last part ends the request.
  def steps({:deltas, parts}) when is_list(parts) do
    {last, parts} = parts |> Enum.map(&steps/1) |> List.pop_at(-1)
    Enum.flat_map(parts, fn steps -> Enum.reject(steps, &match?({:done, _}, &1)) end) ++ last
  end

  def steps({:numbers, [_ | _] = numbers} = reply) do
    unless Enum.all?(numbers, &is_number/1), do: invalid(reply)
    [{:done, reply}]
  end

  def steps({:delay, ms, reply}) when is_integer(ms) and ms >= 0 do
    [{:wait, ms} | steps(reply)]
  end

  def steps({:error, reason, message}) when is_atom(reason) and is_binary(message) do
    steps(Error.new(reason, message))
  end

  def steps({:error, %Error{} = error}), do: steps(error)

  def steps(%Error{reason: reason} = error) do
    unless Keyword.has_key?(Error.Reasons.all(), reason) do
      raise ArgumentError, "#{inspect(reason)} is no reason of a VLLM.Error"
    end

    [{:error, error}]
  end

  def steps(last) when last in [:hang, :die], do: [last]
  def steps(other), do: invalid(other)

  @spec invalid(term()) :: no_return()
  defp invalid(reply), do: raise(ArgumentError, "no reply: #{inspect(reply)} (see VLLM.Test)")
end
