defmodule VLLM.Bridge.Admission do
  @moduledoc false
  # Which requests a run of a worker takes, and when those whom it refuses may
  # find a place: counters, which the callers themselves read and write.
  #
  # The advice is a rate: how many requests ended since a mark. There are two
  # marks, and the rate is measured from the older one, so that it is of the last
  # 16 to 32 requests. Their times are moved on by those in which there was
  # nothing to do.

  alias VLLM.Error

  @type t :: :atomics.atomics_ref()

  # 1 where no request is taken any more.
  @sealed 1
  # How many requests have ended, and when the last one did.
  @ended 2
  @last_end 3
  @older_count 4
  @older_time 5
  @newer_count 6
  @newer_time 7
  # How many were refused since the newer mark.
  @refused 8

  # A mark is set after so many ends.
  @mark_every 16

  # What is advised while nothing has ended yet, and at most; in ms.
  @unknown_wait 1000
  @longest_wait 60_000

  @spec new() :: t()
  def new, do: :atomics.new(8, signed: true)

  @doc "Whether a request is taken that makes `in_flight` of them, where `limit` are allowed."
  @spec admit(t(), pos_integer(), pos_integer() | :infinity) ::
          :ok | :sealed | {:error, Error.t()}
  def admit(counters, in_flight, limit) do
    cond do
      :atomics.get(counters, @sealed) == 1 ->
        :sealed

      in_flight == 1 ->
        skip_idle_time(counters)

      # An atom is more than any number.
      in_flight <= limit ->
        :ok

      true ->
        {:error,
         overloaded(
           counters,
           "#{limit} requests are in flight or waiting already. Try again later, or start the " <>
             "engine with more `max_queue:` or `replicas:`.",
           %{"limit" => limit}
         )}
    end
  end

  defp skip_idle_time(counters) do
    now = System.monotonic_time()

    if :atomics.get(counters, @ended) == 0 do
      :atomics.put(counters, @older_time, now)
      :atomics.put(counters, @newer_time, now)
    else
      idle = max(now - :atomics.get(counters, @last_end), 0)
      :atomics.add(counters, @older_time, idle)
      :atomics.add(counters, @newer_time, idle)
    end
  end

  @doc "The error of a request that is not taken, with the advice when to try again."
  @spec overloaded(t(), String.t(), map()) :: Error.t()
  def overloaded(counters, message, details \\ %{}) do
    Error.new(:overloaded, message, Map.put(details, "retry_after_ms", retry_after(counters)))
  end

  # In how many ms there is a place for the caller, if requests go on to end as
  # they lately did and those who were refused before come again first.
  defp retry_after(counters) do
    refused = :atomics.add_get(counters, @refused, 1)
    ended = :atomics.get(counters, @ended) - :atomics.get(counters, @older_count)

    if ended > 0 do
      since = System.monotonic_time() - :atomics.get(counters, @older_time)
      milliseconds = System.convert_time_unit(since * refused, :native, :millisecond)
      milliseconds |> div(ended) |> max(1) |> min(@longest_wait)
    else
      @unknown_wait
    end
  end

  @doc "Counts the end of a request."
  @spec count_end(t()) :: :ok
  def count_end(counters) do
    now = System.monotonic_time()
    :atomics.put(counters, @last_end, now)
    ended = :atomics.add_get(counters, @ended, 1)

    if rem(ended, @mark_every) == 0 do
      :atomics.put(counters, @older_count, :atomics.get(counters, @newer_count))
      :atomics.put(counters, @older_time, :atomics.get(counters, @newer_time))
      :atomics.put(counters, @newer_count, ended)
      :atomics.put(counters, @newer_time, now)
      :atomics.put(counters, @refused, 0)
    end

    :ok
  end

  @doc "Takes no request any more."
  @spec seal(t()) :: :ok
  def seal(counters), do: :atomics.put(counters, @sealed, 1)

  @doc "Takes requests again."
  @spec unseal(t()) :: :ok
  def unseal(counters), do: :atomics.put(counters, @sealed, 0)
end
