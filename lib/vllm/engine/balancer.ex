defmodule VLLM.Engine.Balancer do
  @moduledoc false
  # Chooses the worker of an engine for a request, or the engine of a cluster. Requests that belong
  # together (a session, or prompts with the same beginning) go to the same one, whose prefix cache
  # then has that beginning, unless it is busier than the others. All other requests go to the least
  # busy one.
  #
  # By rendezvous hashing: each draws a number for the key and the highest wins. So when one comes or
  # goes, only what it wins moves.

  alias VLLM.Engine.Call

  # How much of a prompt counts as its beginning: enough to tell prompts apart, and
  # less than the instructions they may share. In bytes of text, or as many token
  # ids; a block of vLLM's cache is 16 tokens.
  @prefix 128

  # The beginning of a conversation: its instructions and the first question.
  @messages 2

  @typedoc "How many requests one has; how many it computes at once, and what it is told apart by."
  @type candidate :: {
          load :: non_neg_integer(),
          %{:window => pos_integer(), :index => term(), optional(atom()) => term()}
        }

  @doc """
  The one for a request with `params`, of at least one. The one with the index `home` is preferred
  to all others, unless it is busier than they are.
  """
  @spec choose([candidate(), ...], map(), Call.t(), home :: term()) :: map()
  def choose(candidates, params, call, home \\ nil)
  def choose([{_load, one}], _params, _call, _home), do: one

  def choose(candidates, params, call, home) do
    at_home = Enum.find(candidates, fn {_load, one} -> one.index == home end)

    if at_home && free?(at_home, candidates),
      do: elem(at_home, 1),
      else: belonging(candidates, key(params, call))
  end

  defp belonging(candidates, nil), do: least_busy(candidates)

  defp belonging(candidates, key) do
    favourite = Enum.max_by(candidates, fn {_, one} -> :erlang.phash2({key, one.index}) end)

    if free?(favourite, candidates),
      do: elem(favourite, 1),
      else: least_busy(candidates)
  end

  defp least_busy(candidates),
    do: candidates |> Enum.min_by(fn {load, one} -> load / one.window end) |> elem(1)

  # For what it computes at once, at most a quarter and one request more than all have together, and
  # no queue.
  defp free?({load, %{window: window}}, candidates) do
    total = for {load, _} <- candidates, reduce: 0, do: (sum -> sum + load)
    windows = for {_, one} <- candidates, reduce: 0, do: (sum -> sum + one.window)
    load < window and load <= 1.25 * total * window / windows + 1
  end

  @doc "What requests that belong together have in common; nil for those that belong nowhere."
  @spec key(map(), Call.t()) :: non_neg_integer() | nil
  def key(params, %Call{session: nil}) do
    with beginning when beginning != nil <- beginning(params), do: :erlang.phash2(beginning)
  end

  def key(_params, %Call{session: session}), do: :erlang.phash2({:session, session})

  defp beginning(%{"prompt" => prompt}), do: cut(prompt)
  defp beginning(%{"messages" => messages}), do: messages |> Enum.take(@messages) |> cut()
  defp beginning(%{"data_1" => [text | _]}), do: cut(text)
  defp beginning(_params), do: nil

  # The term, with every binary and list in it cut short.
  defp cut(binary) when is_binary(binary),
    do: binary_part(binary, 0, min(byte_size(binary), @prefix))

  defp cut(list) when is_list(list), do: list |> Enum.take(@prefix) |> Enum.map(&cut/1)
  defp cut(struct) when is_struct(struct), do: struct |> Map.from_struct() |> cut()
  defp cut(map) when is_map(map), do: Map.new(map, fn {k, v} -> {k, cut(v)} end)
  defp cut(tuple) when is_tuple(tuple), do: tuple |> Tuple.to_list() |> cut()
  defp cut(other), do: other
end
