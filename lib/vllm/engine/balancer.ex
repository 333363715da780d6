defmodule VLLM.Engine.Balancer do
  @moduledoc false
  # Chooses the worker of an engine for a request, or the engine of a cluster. Requests that belong
  # together (a session, or prompts with the same beginning) go to the same one, whose prefix cache
  # then has that beginning, unless it is busier than the others; then to the less busy of two more,
  # which are the same ones each time, so that few have to read it. All other requests go to the
  # least busy one; of a cluster, whose engines say only now and then how busy they are, to the less busy
  # of any two: else all callers would choose the same one until it says more.
  #
  # By rendezvous hashing: each draws a number for the key and the highest win. So when one comes or
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

  @doc "The one for a request with `params`, of at least one whose load is known exactly."
  @spec choose([candidate(), ...], map(), Call.t()) :: map()
  def choose([{_load, one}], _params, _call), do: one

  def choose(candidates, params, call),
    do: belonging(candidates, key(params, call), &least_busy/1)

  @doc """
  The same of a cluster, of whose loads some were told a while ago. The one with the index `home` is
  preferred to all others, unless it is busier than they are.
  """
  @spec choose_reported([candidate(), ...], map(), Call.t(), home :: term()) :: map()
  def choose_reported([{_load, one}], _params, _call, _home), do: one

  def choose_reported(candidates, params, call, home) do
    at_home = Enum.find(candidates, fn {_load, one} -> one.index == home end)

    if at_home && free?(at_home, candidates),
      do: elem(at_home, 1),
      else: belonging(candidates, key(params, call), &less_busy_of_two/1)
  end

  defp belonging(candidates, nil, else_to), do: else_to.(candidates)

  defp belonging(candidates, key, else_to) do
    drawn =
      for {_, one} = candidate <- candidates, do: {:erlang.phash2({key, one.index}), candidate}

    {_, favourite} = highest = Enum.max_by(drawn, &elem(&1, 0))

    if free?(favourite, candidates),
      do: elem(favourite, 1),
      else: beside(drawn -- [highest], candidates, else_to)
  end

  # For the prompts of a favourite that is busy, by what all have drawn but itself.
  defp beside(drawn, candidates, else_to) do
    next =
      for {_, candidate} <- drawn |> Enum.sort_by(&elem(&1, 0), :desc) |> Enum.take(2),
          do: candidate

    stand_in = Enum.min_by(next, &busyness/1)
    if free?(stand_in, candidates), do: elem(stand_in, 1), else: else_to.(candidates)
  end

  defp least_busy(candidates), do: candidates |> Enum.min_by(&busyness/1) |> elem(1)

  defp busyness({load, %{window: window}}), do: load / window

  defp less_busy_of_two(candidates) do
    all = List.to_tuple(candidates)
    first = :rand.uniform(tuple_size(all)) - 1
    # Any other.
    second = rem(first + :rand.uniform(tuple_size(all) - 1), tuple_size(all))
    least_busy([elem(all, first), elem(all, second)])
  end

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
