defmodule VLLM.Usage do
  @moduledoc false
  # How many tokens outputs took; see `VLLM.usage/1`.

  @type t :: %{
          prompt_tokens: non_neg_integer(),
          completion_tokens: non_neg_integer(),
          total_tokens: non_neg_integer(),
          cached_tokens: non_neg_integer()
        }

  @doc "Of one output, or of a list of them together."
  @spec of(struct() | [struct()]) :: t()
  def of(outputs) do
    outputs = List.wrap(outputs)
    prompt = sum(outputs, &length(&1.prompt_token_ids || []))
    # What is pooled has no completion.
    completions = Enum.flat_map(outputs, &Map.get(&1, :outputs, []))
    completion = sum(completions, &length(&1.token_ids))

    %{
      prompt_tokens: prompt,
      completion_tokens: completion,
      total_tokens: prompt + completion,
      cached_tokens: sum(outputs, &(&1.num_cached_tokens || 0))
    }
  end

  defp sum(items, count), do: items |> Enum.map(count) |> Enum.sum()
end
